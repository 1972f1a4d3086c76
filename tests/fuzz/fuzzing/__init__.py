"""Hostile input: valid specimens of every kind of file, ways to damage them, and who reads them."""
