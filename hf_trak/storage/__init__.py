"""Members on disk: Parquet shards and a Gram matrix. Files are written atomically and read block by block."""
