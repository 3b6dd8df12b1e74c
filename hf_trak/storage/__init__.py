"""Members on disk: Parquet shards and a Gram matrix, written whole or not at all, read back block by block."""
