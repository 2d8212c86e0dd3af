"""A fine-tuned Hugging Face model, out of the pipeline and back into a plain Hugging Face folder.

    checkpoints/global_step100/       checkpoints/hf/
        │ FineTunedCheckpoint             │
        ▼                                 ▼
    tensors ──► [merge adapters] ──► [settle tied weights] ──► write_model

A model with adapters becomes an adapter folder (``adapter.py``), unless they are merged.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.adapter import export_adapter, merged_tensors
from ds_interlock.hf.export.checkpoint import FineTunedCheckpoint
from ds_interlock.hf.export.model_folder import MAX_SHARD_SIZE, ExportReport, write_model
from ds_interlock.hf.model.pretrained import empty_model


def export_model(
    checkpoint: str | Path,
    output: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    heads: bool = False,
    merge_adapter: bool = False,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Writes the whole model as a folder that ``from_pretrained`` loads, or its adapter alone.

    The folder appears whole, and replaces one that holds a model already.

    Args:
        checkpoint: ``.../global_step100``, or the folder above it, whose ``latest`` names it.
        output: The folder to write.
        dtype: Of the weights written; None keeps the checkpoint's, bit for bit.
        max_shard_size: Files larger than this are split, as "5GB".
        heads: Write the auxiliary heads to ``heads.safetensors`` beside the model.
        merge_adapter: Merge adapters into the model, instead of writing them alone, in peft's format.
        trust_remote_code: Run code that came with the model.

    Raises:
        ConfigError: If checkpoint or option is unusable, or the folder cannot be written; then nothing is.
    """
    source = FineTunedCheckpoint(checkpoint, trust_remote_code=trust_remote_code)
    if source.description.peft is None and merge_adapter:
        raise ConfigError(f"--merge_adapter: {source.folder} has no adapter: leave the flag out")
    if source.description.peft is not None and not merge_adapter:
        if heads or dtype is not None:
            raise ConfigError(
                f"{source.folder} has an adapter, which is written alone and as trained: --heads and --dtype "
                "go with --merge_adapter"
            )
        return export_adapter(source, output)
    tensors = merged_tensors(source) if merge_adapter else source.tensors()
    config = source.load_config()
    notes = _settle_tied_weights(source, tensors, config.get_text_config())
    model = empty_model(config, source.description.architecture)
    for alias, name in model.all_tied_weights_keys.items():
        if alias in tensors and name not in tensors:  # the bias of BERT's unembedding, by its other name
            tensors[name] = tensors.pop(alias)
    return write_model(
        output, source, model, tensors, dtype=dtype, max_shard_size=max_shard_size, heads=heads, notes=notes
    )


def _settle_tied_weights(source: FineTunedCheckpoint, tensors: dict[str, Tensor], config: Any) -> list[str]:
    """Unties the embeddings in ``config`` if they were trained apart, and returns a note; else leaves one."""
    if source.description.unembedding is None:
        return []
    embedding = f"{source.description.embedding}.weight"
    unembedding = f"{source.description.unembedding}.weight"
    copies = source.untied_copies
    if copies:
        if embedding not in copies:
            raise ConfigError(
                f"{source.folder}: the last stage has its own copies of {', '.join(copies)}; "
                f"expected {embedding} among them"
            )
        tensors.setdefault(unembedding, copies[embedding])
    if not getattr(config, "tie_word_embeddings", False) or unembedding not in tensors:
        return []
    if torch.equal(tensors[unembedding], tensors[embedding]):
        del tensors[unembedding]
        return []
    config.tie_word_embeddings = False
    return [
        f"the first and the last stage trained {embedding} apart, so the model is no longer tied: "
        f"{unembedding} is written too, and config.json says tie_word_embeddings false"
    ]
