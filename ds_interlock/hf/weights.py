"""Where a model's tensors are, and how a process reads just those it needs.

    model.safetensors.index.json      names of tensors -> shards
    model-00001-of-00003.safetensors  ...

A safetensors file is mapped, not read: a rank that owns three layers of eighty touches three layers of
the file. Each file is opened for one layer at a time, so that what was copied out does not stay mapped.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_interlock.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def has_safetensors(folder: Path) -> bool:
    """Whether a model folder has its weights as safetensors."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


class Weights:
    """The tensors of a folder, by the names of a model's state dict.

    Args:
        folder: Has ``model.safetensors``, or shards with their index.
        dtype: What floating-point tensors are read as.
        prefix: ``base_model_prefix``, which checkpoints of the bare model leave out.
        same: Names of tensors that are tied to others: ``{"lm_head.weight": "model.embed_tokens.weight"}``.

    Raises:
        ConfigError: If the folder has no safetensors, or an index without its shards.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, prefix: str = "", same: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self._prefix = prefix
        self._same = dict(same or {})
        self._files = _files_by_tensor(folder)

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that are not here."""
        return [name for name in names if self._find(name) is None]

    def __call__(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of ``names`` that are here, in memory of their own."""
        wanted: dict[Path, dict[str, str]] = {}
        for name in names:
            stored = self._find(name)
            if stored is not None:
                wanted.setdefault(self._files[stored], {})[name] = stored
        found: dict[str, Tensor] = {}
        for file, stored_names in wanted.items():
            with _opened(file) as tensors:
                for name, stored in stored_names.items():
                    found[name] = self._as_own(tensors.get_tensor(stored))
        return found

    def _find(self, name: str) -> str | None:
        """How the tensor ``name`` is called in the files."""
        candidates = [name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"]
        tied = self._same.get(name)
        if tied is not None:
            candidates += [tied, tied.removeprefix(f"{self._prefix}.")]
        return next((candidate for candidate in candidates if candidate in self._files), None)

    def _as_own(self, mapped: Tensor) -> Tensor:
        dtype = self.dtype if mapped.is_floating_point() else mapped.dtype
        return mapped.to(dtype, copy=True).contiguous()


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if index.is_file():
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        missing = sorted({shard for shard in shards.values() if not (folder / shard).is_file()})
        if missing:
            raise ConfigError(f"--model {folder}: {INDEX} names {', '.join(missing)}, which are not there")
        return {name: folder / shard for name, shard in shards.items()}
    single = folder / SINGLE
    if not single.is_file():
        raise ConfigError(f"--model {folder}: it has neither {SINGLE} nor {INDEX}")
    with _opened(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--model: {file} cannot be read: {error}; is its download complete?") from error
