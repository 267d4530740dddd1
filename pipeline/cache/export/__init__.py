"""A cache in other forms: Arrow tables, pandas frames, open Parquet, readable text."""
