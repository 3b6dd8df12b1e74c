"""One run's processes and threads: launched together, waiting for each other, ending together."""
