"""Data files that ship with the package: the demo text and the embedded teachers."""
