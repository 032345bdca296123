"""The surface to the outside: terminal, shell, signals, pages, and files that a user names."""
