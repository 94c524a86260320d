"""Measurements: how fast, and how good. Run them as modules from the root of the repository."""
