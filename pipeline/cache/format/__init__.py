"""The shard format: Parquet schema, codecs of its binary columns, writer and reader."""
