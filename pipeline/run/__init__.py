"""Stages of a run, the jobs that they start, and the command line."""
