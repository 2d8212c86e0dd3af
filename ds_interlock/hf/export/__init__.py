"""Checkpoints of a pipeline written as Hugging Face folders."""
