"""One run: its folder and records, what each result depends on, its data and its models."""
