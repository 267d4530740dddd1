"""Verification of a cache: completeness, damage, invariants of the signals, and the error of the kept entries."""
