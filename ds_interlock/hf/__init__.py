"""Hugging Face models on a pipeline: cut into layers, fed with their data, exported again."""

from ds_interlock.hf.model.cut import build_all
from ds_interlock.hf.model.pretrained import open_pretrained

__all__ = ["build_all", "open_pretrained"]
