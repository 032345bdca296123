"""The settings of a run, and what can be known of it before anything is spent."""
