"""Text and labelled samples as token batches."""
