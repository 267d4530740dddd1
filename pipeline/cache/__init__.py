"""The cache: Parquet shards of a teacher's signals, committed atomically and verifiable from their own files."""
