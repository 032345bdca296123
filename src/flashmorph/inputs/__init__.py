"""Validation of files from a user or an earlier run: JSON and shapes, YAML, settings and signatures."""
