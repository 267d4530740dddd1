"""Checks of a cache: damage, gaps, disagreement, and what its kept entries lose."""
