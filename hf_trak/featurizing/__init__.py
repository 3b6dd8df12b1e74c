"""Rows to features: batches, gradients of one checkpoint, sketches, and the loop over a dataset."""
