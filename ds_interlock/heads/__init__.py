"""Auxiliary heads: how they are built, what they read, and what they learn from."""
