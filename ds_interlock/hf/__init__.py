"""Hugging Face models on a pipeline: cut into layers, fed with their data, exported again."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_interlock.hf.model.cut import build_all
    from ds_interlock.hf.model.pretrained import open_pretrained

__all__ = ["build_all", "open_pretrained"]

_HOME = {"build_all": "model.cut", "open_pretrained": "model.pretrained"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
