"""Where checkpoints and training sets come from, and how to tell two of them apart."""
