"""A Hugging Face model folder from a configuration and tensors.

config ──► empty_model: the architecture, without weights
              │ check_tensors: exactly its names and shapes
tensors ──► write_model: config.json, model*.safetensors, [heads.safetensors], tokenizer, ...

The folder appears whole, replaces only a model, and is checked for room first.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ds_interlock.errors import ConfigError, first_names, list_faults
from ds_interlock.files import unfinished_folder
from ds_interlock.hf.export.checkpoint import FineTunedCheckpoint

HEADS_FILE = "heads.safetensors"
MAX_SHARD_SIZE = "5GB"
_OF_A_MODEL = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    output: Path
    what: str  # in words, as "LlamaForCausalLM"
    num_parameters: int  # numbers in its tensors, heads aside
    num_bytes: int  # size of all tensors written
    notes: Sequence[str] = ()  # what a user may not expect, one sentence each

    def __str__(self) -> str:
        size = f"{self.num_parameters:,} parameters, {self.num_bytes / 2**20:,.1f} MiB"
        return "\n".join([f"{self.output}: {self.what}, {size}", *(f"note: {note}" for note in self.notes)])


def check_tensors(model: Any, tensors: Mapping[str, Tensor], subject: str) -> None:
    """Makes sure that ``tensors`` are those of ``model``; a tied weight's other name may be missing."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    groups = {
        "missing": [name for name in expected if name not in tensors and name not in tied],
        "unknown to the architecture": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} is {list(tensor.shape)}, expected {list(expected[name])}"
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name]
        ],
    }
    faults = [f"{what}: {first_names(names)}" for what, names in groups.items() if names]
    if faults:
        what = f"{subject}: its tensors are not those of {type(model).__name__}"
        raise ConfigError(list_faults(what, faults))


def write_model(
    output: str | PathLike[str],
    source: FineTunedCheckpoint,
    model: Any,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    max_shard_size: str,
    heads: bool = False,
    notes: Sequence[str],
) -> ExportReport:
    """Writes a folder that ``from_pretrained`` loads; for the options see ``export_model``.

    ``model`` is the architecture without weights, with the configuration to write; ``notes`` are for the
    report.
    """
    check_tensors(model, tensors, str(source.folder))
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    head_tensors, metadata = _heads(source) if heads else ({}, {})
    # save_pretrained writes the model's dtype to config.json, which from_pretrained then loads in.
    dtypes = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    model.to(reduce(torch.promote_types, dtypes))
    num_bytes = sum(tensor.nbytes for some in (tensors, head_tensors) for tensor in some.values())
    with new_folder(output, num_bytes, source.hf_folder) as folder:
        model.save_pretrained(folder, state_dict=dict(tensors), max_shard_size=max_shard_size)
        if head_tensors:
            save_file(head_tensors, folder / HEADS_FILE, metadata)
        source.copy_companions(folder)
    if heads and not head_tensors:
        notes = [*notes, f"the checkpoint has no auxiliary heads: no {HEADS_FILE} was written"]
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    return ExportReport(Path(output), type(model).__name__, num_parameters, num_bytes, tuple(notes))


def _heads(source: FineTunedCheckpoint) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The heads' tensors as ``heads.<loss>.<name>``, and each head's position as metadata."""
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for loss, state in source.heads.items():
        position = source.plan.heads[loss]
        tensors |= {f"heads.{loss}.{name}": tensor.contiguous() for name, tensor in state.items()}
        metadata[f"heads.{loss}.stage"] = str(position.stage)
        metadata[f"heads.{loss}.after_layer"] = str(position.after_layer)
    return tensors, metadata


@contextmanager
def new_folder(output: str | PathLike[str], num_bytes: int, source: Path | None = None) -> Iterator[Path]:
    """Yields a hidden folder to write into, which becomes ``output`` at the end; after an error, nothing.

    An existing one is replaced only if it holds a model and is not ``source``, which is read for it.
    ``num_bytes`` will be written; they are compared with the free space first.
    """
    target = Path(output).resolve()
    _check_replaceable(target, source)
    nearest_existing = next(folder for folder in (target, *target.parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(nearest_existing).free
    sizes = f"it takes {num_bytes:,} bytes, and {free_bytes:,} are free there"
    advice = "make room, or give another folder"
    if num_bytes > free_bytes:
        raise ConfigError(f"{output} does not fit on its disk: {sizes}; {advice}")
    try:
        with unfinished_folder(target) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise
        raise ConfigError(f"{output} cannot be written ({error}): {sizes}; {advice}") from error


def _check_replaceable(target: Path, source: Path | None) -> None:
    if source is not None and target in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{target} holds what is to be exported: give another folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file: give a folder")
    if any(target.iterdir()) and not any((target / name).is_file() for name in _OF_A_MODEL):
        raise ConfigError(
            f"{target} is not empty and holds no Hugging Face model that could be replaced (no "
            f"{' or '.join(_OF_A_MODEL)}): give a new folder"
        )
