"""The command line: `hf-trak demo | featurize | attribute`."""
