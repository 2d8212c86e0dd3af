"""A pretrained Hugging Face model, opened: its configuration, tokenizer and tensors, nothing loaded yet.

name on the hub ──► snapshot ─┐
folder ───────────────────────┼─► config, tokenizer, safetensors ──► Pretrained ──► Blueprint
folder with .bin or .gguf ────┴─► converted once by transformers, and kept as safetensors
"""

import hashlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
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
from ds_interlock.files import unfinished_folder
from ds_interlock.hf.cut import Blueprint
from ds_interlock.hf.records import Task
from ds_interlock.hf.surgery import Skeleton
from ds_interlock.hf.tokenizer import default_cache_dir
from ds_interlock.hf.weights import Weights, has_safetensors

_AUTO_MODELS: Mapping[Task, Any] = {
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth")


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
        skeleton = Skeleton(self.new_model())
        values = _Values(self, skeleton)
        parameters = Blueprint(skeleton, values).parameters()
        return sorted(name for name in values.weights.lacking(parameters) if not values.is_new(name))


def empty_model(config: Any, task: Task, dtype: torch.dtype) -> Any:
    """A transformers model without weights, in evaluation mode.

    Raises:
        ConfigError: If transformers has no model of this configuration for the task.
    """
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
    if gguf_file is not None or not has_safetensors(folder):
        folder = _converted(folder, name, gguf_file, task, cache_dir or default_cache_dir())
    config = _load_config(name, folder, classes)
    pretrained = Pretrained(name, folder, config, _load_tokenizer(name, folder), task, dtype)
    lacking = pretrained.lacking()
    if lacking:
        # Names that transformers renames or merges when it loads: let it do so once.
        folder = _converted(folder, name, None, task, cache_dir or default_cache_dir())
        pretrained = Pretrained(name, folder, config, pretrained.tokenizer, task, dtype)
        lacking = pretrained.lacking()
    if lacking:
        raise ConfigError(
            f"--model {name}: its weights lack {', '.join(lacking[:5])}{' ...' * (len(lacking) > 5)}, which "
            f"{config.architectures} needs"
        )
    return pretrained


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
        detail = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"--model {name}: there is no folder of this name, and it cannot be had from the hub ({detail})"
        ) from error
    return folder


def _load_config(name: str, folder: Path, classes: Sequence[str]) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        detail = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"--model {name}: no configuration could be loaded ({detail}); expected a config.json of a model "
            "that transformers knows"
        ) from error
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: number for number, label in enumerate(classes)}
    return config


def _load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        detail = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"--model {name}: no tokenizer could be loaded ({detail}); expected its files beside config.json"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _converted(folder: Path, name: str, gguf_file: str | None, task: Task, cache_dir: Path) -> Path:
    """The model as safetensors with the names of its modules, from the cache or made now."""
    sources = [folder / gguf_file] if gguf_file else sorted(p for p in folder.iterdir() if p.is_file())
    missing = [source.name for source in sources if not source.is_file()]
    if missing:
        found = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise ConfigError(f"--gguf_file {missing[0]}: not in {folder}; GGUF files there: {found}")
    stamps = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    key = hashlib.sha256(repr((stamps, task, transformers.__version__)).encode()).hexdigest()[:16]
    target = cache_dir / f"model-{Path(gguf_file or folder.name).stem}-{key}"
    if has_safetensors(target):
        return target
    options = {"gguf_file": gguf_file} if gguf_file else {}
    with unfinished_folder(target) as draft:
        try:
            model = _AUTO_MODELS[task].from_pretrained(folder, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        except ImportError as error:
            raise ConfigError(f"--model {name}: {str(error).strip().splitlines()[0]}") from error
        except (OSError, ValueError) as error:
            detail = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise ConfigError(f"--model {name}: transformers cannot load it ({detail})") from error
        if gguf_file:  # its weights are plain numbers now
            model.hf_quantizer = None
            del model.config.quantization_config
        model.save_pretrained(draft, save_original_format=False)
        tokenizer.save_pretrained(draft)
        for extra in folder.glob("generation_config.json"):
            shutil.copy(extra, draft)
    return target
