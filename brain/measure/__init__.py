"""Instruments: bench, evaluation, goldens and profiles. Not part of the product."""
