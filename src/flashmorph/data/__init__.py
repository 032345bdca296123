"""Text: files, splits, conversations, documents as tokens, rows on disk, and how documents in a row stay apart."""
