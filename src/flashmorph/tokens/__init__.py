"""Special tokens before and behind a text, and the text that new tokens add to a prompt."""
