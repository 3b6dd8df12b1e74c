"""Copies, uploads and downloads of indexes, and their dataset cards."""
