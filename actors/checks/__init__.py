"""Checks of a captured cache against the teacher that it was captured from."""
