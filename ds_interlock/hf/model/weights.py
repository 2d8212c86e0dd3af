"""Where a model's tensors are, and how a process reads just those it needs.

    model.safetensors.index.json      names of tensors -> shards
    model-00001-of-00003.safetensors  ...

A safetensors file is mapped, not read. Large tensors are copied in pieces, and the file is closed after each:
what was copied does not stay mapped, so a process never holds much more than what it keeps.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as SINGLE

from ds_interlock.errors import ConfigError
from ds_interlock.files import read_record

_PIECE_NUMBERS = 2**20  # of a tensor, copied at once


def has_safetensors(folder: Path) -> bool:
    """Whether a model folder has its weights as safetensors."""
    return any((folder / name).is_file() for name in (INDEX, SINGLE))


class Weights:
    """The tensors of a folder, by the names of a model's state dict.

    Floating-point ones are converted to ``dtype``. Checkpoints of the bare model leave out ``prefix``, its
    ``base_model_prefix``. ``same`` has tied tensors: ``{"lm_head.weight": "model.embed_tokens.weight"}``.
    ConfigError if the folder has no safetensors, an index without its shards, or a file cut short.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, prefix: str = "", same: Mapping[str, str] | None = None
    ) -> None:
        self.dtype, self._prefix, self._same = dtype, prefix, dict(same or {})
        self._stored: dict[str, _Stored] = {}
        for file in _files(folder):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    tensor = tensors.get_tensor(name)
                    self._stored[name] = _Stored(file, name, tensor.shape, tensor.dtype)

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that the files do not have."""
        return [name for name in names if self._find(name) is None]

    def misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Those of ``tensors`` that have another shape in the files, with both shapes."""
        return [
            f"{name} is {list(stored.shape)} in the files, expected {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if (stored := self._find(name)) is not None and stored.shape != tensor.shape
        ]

    def __call__(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of ``names`` that the files have, in memory of their own."""
        stored = {name: self._find(name) for name in names}
        return {name: self._read(tensor) for name, tensor in stored.items() if tensor is not None}

    def _find(self, name: str) -> "_Stored | None":
        """Where the tensor ``name`` is, under any of its names."""
        tied = self._same.get(name, name)
        prefix = f"{self._prefix}."
        candidates = [name, name.removeprefix(prefix), prefix + name, tied, tied.removeprefix(prefix)]
        return next((self._stored[candidate] for candidate in candidates if candidate in self._stored), None)

    def _read(self, stored: "_Stored") -> Tensor:
        dtype = self.dtype if stored.dtype.is_floating_point else stored.dtype
        whole = torch.empty(stored.shape, dtype=dtype, device="cpu")
        numbers = whole.view(-1)
        for start in range(0, whole.numel(), _PIECE_NUMBERS):
            piece = slice(start, start + _PIECE_NUMBERS)
            with _opened(stored.file) as tensors:
                numbers[piece].copy_(tensors.get_tensor(stored.name).view(-1)[piece])
        return whole


class _Stored(NamedTuple):
    file: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype


class _Index(BaseModel):
    weight_map: dict[str, str]


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        shards = read_record(index, _Index, what="list of shards", hint="fetch it again").weight_map.values()
        missing = [shard for shard in sorted(set(shards)) if not (folder / shard).is_file()]
        if missing:
            raise ConfigError(f"--model {folder}: {INDEX} names {', '.join(missing)}, which do not exist")
        return [folder / shard for shard in sorted(set(shards))]
    if not (folder / SINGLE).is_file():
        raise ConfigError(f"--model {folder}: it has neither {SINGLE} nor {INDEX}")
    return [folder / SINGLE]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--model: {file} cannot be read ({error}): is its download complete?") from error
