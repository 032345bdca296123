"""The path from a teacher to a published hybrid, and what can be done with finished ones."""
