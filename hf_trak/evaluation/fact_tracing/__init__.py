"""Fact tracing."""
