"""What a user or an earlier run wrote, held against what it must be: JSON and shapes, YAML, settings and signatures."""
