"""Every architecture of transformers against a plain loop over examples: `python -m tests.zoo --help`."""
