"""A run on disk: its record, journal, lock, commands and captures."""
