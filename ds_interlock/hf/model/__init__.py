"""A Hugging Face model as pipeline layers: anatomy, weights, cut, check against the whole model."""
