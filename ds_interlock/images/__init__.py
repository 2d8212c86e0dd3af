"""Images and their classes as batches."""
