"""Cached rows in open formats: Arrow, pandas, torch, Parquet lists, and text for a terminal."""
