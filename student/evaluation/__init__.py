"""Metrics on held-out text, and the table of a report."""
