"""The shard: its schema, codecs and Parquet file."""
