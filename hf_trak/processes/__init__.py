"""One process among others, and its threads: launched together, waiting for each other, ending together; what it does about garbage."""
