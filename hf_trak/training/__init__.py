"""What a training run leaves for attribution: snapshots, records, and the further runs of an ensemble."""
