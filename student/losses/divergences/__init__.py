"""Divergences between two distributions over the kept entries and the tail."""
