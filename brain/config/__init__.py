"""What may be set: the configuration, checked once."""
