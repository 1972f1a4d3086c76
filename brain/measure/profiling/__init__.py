"""Where the time of a tick goes: ranges from a profiler's report, as a table and as a picture."""
