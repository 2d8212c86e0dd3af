"""A Hugging Face model folder from a configuration and tensors.

config ──► empty_model: the architecture, without weights
              │ check_tensors: exactly its names and shapes
tensors ──► write_model: config.json, model*.safetensors, [heads.safetensors], tokenizer, ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ds_interlock.errors import ConfigError, list_faults
from ds_interlock.hf.export.finetuned import FineTunedCheckpoint
from ds_interlock.hf.export.new_folder import new_folder

HEADS_FILE = "heads.safetensors"
MAX_SHARD_SIZE = "5GB"
_NAMED = 5  # tensors that a message names before it only counts


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        output: The folder.
        what: In words, as "LlamaForCausalLM".
        num_parameters: Numbers in its tensors, heads aside.
        num_bytes: Size of all tensors written.
        notes: What a user may not expect, one sentence each.
    """

    output: Path
    what: str
    num_parameters: int
    num_bytes: int
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        """Lines for a terminal."""
        size = f"{self.num_parameters:,} parameters, {self.num_bytes / 2**20:,.1f} MiB"
        return "\n".join([f"{self.output}: {self.what}, {size}", *(f"note: {note}" for note in self.notes)])


def check_tensors(model: Any, tensors: Mapping[str, Tensor], subject: str) -> None:
    """Makes sure that ``tensors`` are those of ``model``; a tied weight's other name may be missing.

    Raises:
        ConfigError: If names are missing, unknown, or have other shapes. It begins with ``subject``.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong_shape = [
        f"{name} is {list(tensor.shape)}, expected {list(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    groups = {
        "missing": [name for name in expected if name not in tensors and name not in tied],
        "unknown to the architecture": [name for name in tensors if name not in expected],
        "of another shape": wrong_shape,
    }
    faults = [f"{what}: {_listed(names)}" for what, names in groups.items() if names]
    if faults:
        raise ConfigError(
            list_faults(f"{subject}: its tensors are not those of {type(model).__name__}", faults)
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def write_model(
    output: str | PathLike[str],
    source: FineTunedCheckpoint,
    model: Any,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    heads: bool = False,
    notes: Sequence[str] = (),
) -> ExportReport:
    """Writes a folder that ``from_pretrained`` loads.

    Args:
        output: The folder.
        source: Where tokenizer, generation configuration and heads come from.
        model: The architecture without weights, with the configuration to write.
        tensors: Its weights.
        dtype: Of the floating-point tensors written, heads aside; None leaves them as they are.
        max_shard_size: Files larger than this are split, as "5GB".
        heads: Write the auxiliary heads beside the model.
        notes: For the report.

    Returns:
        What was written.

    Raises:
        ConfigError: If the tensors do not fit the model, or the folder cannot be written.
    """
    check_tensors(model, tensors, str(source.folder))
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    head_tensors, metadata = _heads(source) if heads else ({}, {})
    # save_pretrained writes the model's dtype to config.json, which from_pretrained then loads in.
    model.to(_common_dtype(tensors))
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


def _common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in tensors.values() if t.is_floating_point()))


def _heads(source: FineTunedCheckpoint) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The heads' tensors as ``heads.<loss>.<name>``, and each head's position as metadata."""
    tensors = {
        f"heads.{loss}.{name}": tensor.contiguous()
        for loss, head in source.heads.items()
        for name, tensor in head.items()
    }
    metadata = {"format": "pt"}
    for loss in source.heads:
        head = source.plan.heads[loss]
        metadata[f"heads.{loss}.stage"] = str(head.stage)
        metadata[f"heads.{loss}.after_layer"] = str(head.after_layer)
    return tensors, metadata
