"""A pretrained Hugging Face model, opened: its configuration, tokenizer and tensors, nothing loaded yet.

name on the hub ──► snapshot ─┐
folder ───────────────────────┼─► config, tokenizer, safetensors ──► Pretrained ──► Blueprint
folder with .bin or .gguf ────┴─► converted once by transformers, and kept as safetensors
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.records import Task
from ds_interlock.hf.data.tokenizer import default_cache_dir
from ds_interlock.hf.model.conversion import converted, first_line
from ds_interlock.hf.model.cut import Blueprint
from ds_interlock.hf.model.surgery import Skeleton, refuse_other_models
from ds_interlock.hf.model.weights import Weights, has_safetensors

_AUTO_MODELS: Mapping[Task, Any] = {
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth")
_POSITIONS = "position_embeddings"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model that can be cut.

    Attributes:
        name: As the user gave it.
        folder: Where configuration, tokenizer and safetensors are.
        config: Its transformers configuration.
        tokenizer: Its tokenizer.
        task: What it is used for.
        dtype: What its weights are read as.
    """

    name: str
    folder: Path
    config: Any
    tokenizer: PreTrainedTokenizerBase
    task: Task
    dtype: torch.dtype

    def new_model(self) -> Any:
        """The transformers model with its parameters on the meta device and buffers in memory."""
        return empty_model(self.config, self.task, self.dtype)

    def blueprint(self, inputs: tuple[str, ...] = ("input_ids",), *, tie: bool = True) -> Blueprint:
        """The model as layers to build; see ``Blueprint``."""
        skeleton = Skeleton(self.new_model())
        return Blueprint(skeleton, _Values(self, skeleton), inputs, tie)

    def lacking(self) -> list[str]:
        """Names of parameters that the files do not have, new ones aside."""
        values, parameters = self._values_and_parameters
        return sorted(name for name in values.weights.lacking(parameters) if not values.is_new(name))

    def misfits(self) -> list[str]:
        """Parameters that have another shape in the files, with both shapes."""
        values, parameters = self._values_and_parameters
        return values.weights.misfits(parameters)

    def num_positions(self) -> int | None:
        """The longest sequence that the model knows; None if it knows no bound."""
        known: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        tables = (part for name, part in self.new_model().named_modules() if name.endswith(_POSITIONS))
        # RoBERTa's positions begin behind the number of the padding token.
        paddings = (getattr(table, "padding_idx", None) for table in tables)
        first = next((padding + 1 for padding in paddings if padding is not None), 0)
        return None if known is None else known - first

    @cached_property
    def _values_and_parameters(self) -> tuple["_Values", dict[str, Tensor]]:
        skeleton = Skeleton(self.new_model())
        values = _Values(self, skeleton)
        return values, Blueprint(skeleton, values).parameters()


def empty_model(config: Any, task: Task, dtype: torch.dtype) -> Any:
    """A transformers model without weights, in evaluation mode.

    Raises:
        ConfigError: If transformers has no model of this configuration for the task.
    """
    refuse_other_models(config, type(config).__name__)
    try:
        with init_empty_weights(include_buffers=False):
            model = _AUTO_MODELS[task].from_config(config, dtype=dtype)
    except ValueError as error:
        what = {"causal": "a causal language model", "classification": "a sequence classifier"}[task]
        raise ConfigError(
            f"--model: transformers has no {what[2:]} of a {type(config).__name__} (task {task}): give the "
            f"name of {what}"
        ) from error
    return model.eval()


class _Values:
    """A checkpoint's values; those of new modules (a classifier that nobody trained) drawn from a seed."""

    def __init__(self, pretrained: Pretrained, skeleton: Skeleton) -> None:
        anatomy, model = skeleton.anatomy, skeleton.model
        same = {f"{anatomy.unembedding}.weight": f"{anatomy.embedding}.weight"} if anatomy.tied else {}
        self.weights = Weights(pretrained.folder, pretrained.dtype, model.base_model_prefix, same)
        self._may_be_new = tuple(f"{part}." for part in anatomy.end if anatomy.unembedding is None)
        self._std = getattr(pretrained.config, "initializer_range", 0.02)

    def is_new(self, name: str) -> bool:
        """Whether a tensor may be missing."""
        return name.startswith(self._may_be_new) if self._may_be_new else False

    def __call__(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.weights(wanted)
        new = {name: like for name, like in wanted.items() if name not in found and self.is_new(name)}
        return {**found, **{name: self._drawn(name, like) for name, like in new.items()}}

    def _drawn(self, name: str, like: Tensor) -> Tensor:
        if like.dim() < 2:
            is_norm = name.lower().endswith("norm.weight")
            return torch.full(like.shape, float(is_norm), dtype=like.dtype, device="cpu")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        return nn.init.normal_(drawn, std=self._std, generator=generator)


def open_pretrained(
    name: str,
    task: Task = "causal",
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    classes: Sequence[str] = (),
    cache_dir: Path | None = None,
) -> Pretrained:
    """Finds a model's files, converting them if they are no safetensors.

    On one machine let one process do it first; the others find its work.

    Args:
        name: A folder, or a name on the hub.
        task: What it will be used for.
        gguf_file: Name of a GGUF file in it, which then has configuration and tokenizer too.
        dtype: What its weights are read as.
        classes: Names of the classes by id, for classification.
        cache_dir: Where converted weights are kept; default ``default_cache_dir()``.

    Raises:
        ConfigError: If there is no such model, no tokenizer, or it cannot be converted.
    """
    folder = _local_folder(name, gguf_file)
    auto_model, cache_dir = _AUTO_MODELS[task], cache_dir or default_cache_dir()
    if gguf_file is not None:
        folder = converted(auto_model, folder, name, gguf_file, cache_dir)
    config = load_config(name, folder, classes)
    Skeleton(empty_model(config, task, dtype))  # a model that cannot be cut is refused for that, first
    tokenizer = _load_tokenizer(name, folder)
    if not has_safetensors(folder):
        folder = converted(auto_model, folder, name, None, cache_dir)
    pretrained = Pretrained(name, folder, config, tokenizer, task, dtype)
    if pretrained.lacking():
        # Names that transformers renames or merges when it loads: let it do so once.
        folder = converted(auto_model, folder, name, None, cache_dir)
        pretrained = Pretrained(name, folder, config, tokenizer, task, dtype)
    _check_weights(pretrained)
    return pretrained


def _check_weights(pretrained: Pretrained) -> None:
    lacking, misfits = pretrained.lacking(), pretrained.misfits()
    if lacking:
        named = ", ".join(lacking[:5]) + " ..." * (len(lacking) > 5)
        raise ConfigError(
            f"--model {pretrained.name}: its weights lack {named}, which "
            f"{type(pretrained.config).__name__} needs"
        )
    if misfits and pretrained.task == "classification":
        raise ConfigError(
            f"--model {pretrained.name}: {misfits[0]}, for {pretrained.config.num_labels} classes in the "
            "data: give a model without a classifier, or one that was trained for these classes"
        )
    if misfits:
        raise ConfigError(
            f"--model {pretrained.name}: {misfits[0]} by its config.json; these files do not belong together"
        )


def _local_folder(name: str, gguf_file: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"--model {name}: there is no such folder; give a folder with a config.json (for a GGUF file "
            "its folder, and the file with --gguf_file), or a model's name on the hub"
        )
    wanted = [gguf_file] if gguf_file else ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if gguf_file is None and not has_safetensors(folder):
            folder = Path(snapshot_download(name, allow_patterns=[*wanted, *_OTHER_WEIGHTS]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {name}: there is no folder of this name, and it cannot be had from the hub "
            f"({first_line(error)})"
        ) from error
    return folder


def load_config(name: str, folder: Path | None = None, classes: Sequence[str] = ()) -> Any:
    """A model's transformers configuration.

    Args:
        name: As the user gave it: a folder, or a name on the hub.
        folder: Where its files are, if it is known.
        classes: Names of the classes by id, for classification.

    Raises:
        ConfigError: If there is none.
    """
    try:
        config = AutoConfig.from_pretrained(folder or name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {name}: no Hugging Face configuration could be loaded ({first_line(error)}); give a "
            "folder with the config.json of a model that transformers knows, or a model's name on the hub"
        ) from error
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: number for number, label in enumerate(classes)}
    return config


def _load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(
            f"--model {name}: no tokenizer could be loaded ({first_line(error)}); expected its files beside "
            "config.json"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    # Some classes make do without files, and then know nothing but their special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(f"--model {name}: it has no tokenizer; expected its files beside config.json")
    return tokenizer
