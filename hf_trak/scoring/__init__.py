"""Features to scores: λ, solved queries, and a stream of training rows against them."""
