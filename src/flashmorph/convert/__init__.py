"""Checkpoints on disk: what belongs to one and is read of it, the exact move of a teacher into its host, saving."""
