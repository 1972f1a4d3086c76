"""Timing engines beside each other: each in a process of its own, one at a time, in alternation."""
