"""Checkpoints and training sets: loading them, recording their origin, and comparing them."""
