"""Where a name or a signal of any kind meets the terminal, a shell, a page or a file that a user names."""
