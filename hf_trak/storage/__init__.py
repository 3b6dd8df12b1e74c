"""Members on disk: Parquet shards and a kernel, written whole or not at all, read back block by block."""
