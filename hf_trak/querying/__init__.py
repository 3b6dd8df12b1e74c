"""Queries: their features, made or given, and what one asks of an index about them."""
