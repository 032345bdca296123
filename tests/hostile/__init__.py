"""Malformed and hostile input, made from a seed: each case ends in one sentence, or in what is right."""
