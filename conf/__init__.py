"""Hydra configuration groups and their schema."""
