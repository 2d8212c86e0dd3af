"""From checkpoints of a pipeline back to Hugging Face folders."""
