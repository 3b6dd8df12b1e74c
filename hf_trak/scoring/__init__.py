"""From features to scores: damping, solved queries, and their products with the training rows."""
