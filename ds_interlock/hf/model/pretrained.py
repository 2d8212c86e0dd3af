"""A pretrained Hugging Face model: its configuration, tokenizer and the places of its tensors.

name on the hub ──► snapshot ─┐
folder ───────────────────────┼─► config, tokenizer, safetensors ──► Pretrained ──► Blueprint
folder with .bin or .gguf ────┴─► converted once by transformers, and kept as safetensors
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ds_interlock.errors import ConfigError, first_line, first_names
from ds_interlock.hf.data.records import Task
from ds_interlock.hf.data.rows import padding_id
from ds_interlock.hf.data.tokenizer import default_cache_dir
from ds_interlock.hf.model.anatomy import refuse_other_models
from ds_interlock.hf.model.convert import converted
from ds_interlock.hf.model.cut import Blueprint
from ds_interlock.hf.model.four_bits import FourBits
from ds_interlock.hf.model.routing import find_routing
from ds_interlock.hf.model.surgery import Skeleton
from ds_interlock.hf.model.weights import Weights, has_safetensors

_AUTO_MODELS: Mapping[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
}
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model that can be cut."""

    name: str  # as the user wrote it
    folder: Path  # has configuration, tokenizer and safetensors
    config: Any
    tokenizer: PreTrainedTokenizerBase
    task: Task
    dtype: torch.dtype  # what its weights are converted to
    seed: int = 0  # of a new classifier's weights
    four_bits: FourBits | None = None  # how linear weights of its blocks are kept, if not in full

    def new_model(self) -> Any:
        """The transformers model with its parameters on the meta device and buffers in memory."""
        return empty_model(self.config, self.task, self.dtype)

    def blueprint(self, inputs: tuple[str, ...] = ("input_ids",), *, tie: bool = True) -> Blueprint:
        """The model as layers to build; see ``Blueprint``."""
        skeleton = Skeleton(self.new_model())
        routing = find_routing(skeleton.model)
        prepare = [] if self.four_bits is None else [self.four_bits.replace]
        return Blueprint(skeleton, _Values(self, skeleton), inputs, tie, routing, list(prepare))

    def class_ids(self, label_ids: Mapping[int | str, int]) -> dict[int | str, int]:
        """The ids of the data's classes in the model; ``label_ids`` are those of ``load_records``."""
        own, known = self.config.label2id, _ids_by_name(self.config)
        return {
            label: own.get(label, known.get(label.lower(), number)) if isinstance(label, str) else number
            for label, number in label_ids.items()
        }

    def num_positions(self) -> int | None:
        """The longest sequence that the model can take; None if there is no bound."""
        known: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        modules = self.new_model().named_modules()
        tables = (part for name, part in modules if name.endswith("position_embeddings"))
        # RoBERTa's positions begin after the id of the padding token.
        paddings = (getattr(table, "padding_idx", None) for table in tables)
        first = next((padding + 1 for padding in paddings if padding is not None), 0)
        return None if known is None else known - first


def empty_model(config: Any, kind: str, dtype: torch.dtype | None = None) -> Any:
    """A transformers model in evaluation mode, parameters on the meta device, buffers in memory.

    ``kind`` is a task, or the name of a class in transformers, as "LlamaForCausalLM", or in the code that
    came with the model. The parameters have ``dtype``, by default the configuration's. ConfigError if
    transformers cannot build it.
    """
    refuse_other_models(config, type(config).__name__)
    own_code = has_own_code(config)
    if own_code and kind not in _AUTO_MODELS:
        kind = "classification" if kind.endswith("ForSequenceClassification") else "causal"
    automatic = _AUTO_MODELS.get(kind)
    model_class: Any = automatic or getattr(transformers, kind, None)
    if model_class is None:
        raise ConfigError(
            f"architecture: transformers {transformers.__version__} has no {kind}; install the version that "
            "the model was fine-tuned with"
        )
    build = automatic.from_config if automatic else model_class._from_config
    if not automatic and model_class.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()  # as from_config does
    try:
        with init_empty_weights(include_buffers=False):
            options = {"trust_remote_code": True} if own_code else {}
            return build(config, dtype=dtype or config.dtype, **options).eval()
    except (ValueError, TypeError) as error:
        if automatic is None:
            raise ConfigError(f"{kind} cannot be built from its configuration: {error}") from error
        what = {"causal": "causal language model", "classification": "sequence classifier"}[kind]
        raise ConfigError(
            f"--model: transformers has no {what} of a {type(config).__name__} (task {kind}): give the "
            "name of another model"
        ) from error


class _Values:
    """A checkpoint's values; those of new modules (an untrained classifier) drawn from a seed."""

    def __init__(self, pretrained: Pretrained, skeleton: Skeleton) -> None:
        anatomy, model = skeleton.anatomy, skeleton.model
        same = {f"{anatomy.unembedding}.weight": f"{anatomy.embedding}.weight"} if anatomy.tied else {}
        same |= {f"{anatomy.unembedding}.bias": anatomy.stored_bias} if anatomy.stored_bias else {}
        self.weights = Weights(pretrained.folder, pretrained.dtype, model.base_model_prefix, same)
        self._may_be_new = tuple(f"{part}." for part in anatomy.end if anatomy.unembedding is None)
        self._seed = pretrained.seed
        self._std = getattr(pretrained.config, "initializer_range", 0.02)

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that the files do not have, new ones aside."""
        return sorted(name for name in self.weights.lacking(names) if not self._is_new(name))

    def __call__(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stored = self.weights(wanted)
        new = (name for name in wanted if name not in stored and self._is_new(name))
        return stored | {name: self._draw(name, wanted[name]) for name in new}

    def _is_new(self, name: str) -> bool:
        return bool(self._may_be_new) and name.startswith(self._may_be_new)

    def _draw(self, name: str, like: Tensor) -> Tensor:
        if like.dim() < 2:
            is_norm = name.lower().endswith("norm.weight")
            return torch.full(like.shape, float(is_norm), dtype=like.dtype, device="cpu")
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(name.encode()))
        values = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        return nn.init.normal_(values, std=self._std, generator=generator)


def open_pretrained(
    name: str,
    task: Task = "causal",
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    classes: Sequence[str] = (),
    attn_implementation: str | None = None,
    cache_dir: Path | None = None,
    text_model_only: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Pretrained:
    """Finds a model's files, converting them if they are no safetensors.

    Let one process of a machine do it first: the others then take its files from the cache.

    Args:
        name: A folder, or a name on the hub.
        task: What it will be used for.
        gguf_file: Name of a GGUF file in it, which then has configuration and tokenizer too.
        dtype: What its weights are converted to.
        classes: Names of the data's classes by id, for classification. A model that was trained for all of
            them, whatever their case, keeps its ids, and one with names keeps them if the data have numbers.
        attn_implementation: Transformers' name of an attention kernel; default: transformers' choice.
        cache_dir: Where converted weights are kept; default ``default_cache_dir()``.
        text_model_only: Take the text part of a model that also sees or hears.
        trust_remote_code: Run code that comes with the model.
        seed: Of the weights of a classifier that it lacks.

    Raises:
        ConfigError: If the model or its tokenizer is not found, it cannot be converted, or it cannot use the
            attention kernel.
    """
    folder = _local_folder(name, gguf_file, trust_remote_code)
    auto_model, cache_dir = _AUTO_MODELS[task], cache_dir or default_cache_dir()
    if gguf_file is not None:
        folder = converted(auto_model, folder, name, gguf_file, cache_dir)
    config = load_config(name, folder, classes, trust_remote_code=trust_remote_code)
    own_code = has_own_code(config)
    quantization = getattr(config, "quantization_config", None)
    if text_model_only:
        if quantization:
            fault = f"the weights of {name} are quantised (quantization_config in its config.json)"
            raise ConfigError(f"--text_model_only: {fault}: give the model in full precision")
        text_config = _text_config(name, config, task)
        folder = converted(auto_model, folder, name, None, cache_dir, text_part=text_config)
        config = load_config(name, folder)
    skeleton = Skeleton(empty_model(config, task, dtype))  # refuses what cannot be cut, before anything else
    if quantization:
        how: Any = {"own_code": own_code, "quantization": quantization}
        folder = converted(auto_model, folder, name, None, cache_dir, **how)
        config = load_config(name, folder, classes, trust_remote_code=trust_remote_code)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
        try:
            skeleton = Skeleton(empty_model(config, task, dtype))
        except (ConfigError, ImportError) as error:
            why = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            raise ConfigError(f"--attn_implementation {attn_implementation}: {why}") from error
    tokenizer = _load_tokenizer(name, folder, trust_remote_code)
    if task == "classification":
        _set_padding(config.get_text_config(), tokenizer)
    if not has_safetensors(folder):
        folder = converted(auto_model, folder, name, None, cache_dir, own_code=own_code)
    pretrained = Pretrained(name, folder, config, tokenizer, task, dtype, seed)
    values = _Values(pretrained, skeleton)
    parameters = Blueprint(skeleton, values).parameters()
    if values.lacking(parameters):
        # transformers renames or merges some when it loads: let it do so once.
        folder = converted(auto_model, folder, name, None, cache_dir, own_code=own_code)
        pretrained = replace(pretrained, folder=folder)
        values = _Values(pretrained, skeleton)
    _check_weights(pretrained, values, parameters)
    return pretrained


def _set_padding(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """A decoder that classifies knows padding by its id."""
    if config.pad_token_id not in range(config.vocab_size):
        config.pad_token_id = padding_id(tokenizer, config.vocab_size)


def _check_weights(pretrained: Pretrained, values: _Values, parameters: Mapping[str, Tensor]) -> None:
    lacking, misfits = values.lacking(parameters), values.weights.misfits(parameters)
    if lacking:
        fault = f"its weights lack {first_names(lacking)}, which {type(pretrained.config).__name__} needs"
        raise ConfigError(f"--model {pretrained.name}: {fault}")
    if misfits:
        why = " by its config.json; these files do not belong together"
        if pretrained.task == "classification":
            classes = f", for {pretrained.config.num_labels} classes in the data"
            why = f"{classes}: give a model without a classifier, or one that was trained for these classes"
        raise ConfigError(f"--model {pretrained.name}: {misfits[0]}{why}")


def _text_config(name: str, config: Any, task: Task) -> Any:
    """The configuration of the text part of a model that has one."""
    text_config = config.get_text_config(decoder=True)
    if text_config is config:
        raise ConfigError(f"--text_model_only: {name} is a text model already: leave the flag out")
    if task != "causal":
        raise ConfigError("--text_model_only goes with --task causal")
    empty_model(text_config, task)  # or says why not
    return text_config


def has_own_code(config: Any) -> bool:
    """Whether a model's configuration is code that came with it, which the user has trusted."""
    return type(config).__module__.startswith("transformers_modules.")


def _local_folder(name: str, gguf_file: str | None, with_code: bool) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"--model {name}: no such folder; give a folder with a config.json (for a GGUF file "
            "its folder, and the file with --gguf_file), or a model's name on the hub"
        )
    patterns = [gguf_file] if gguf_file else ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    patterns += ["*.py", "*.tiktoken", "*.bpe"] if with_code else []  # vocabularies that tokenizers read
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if gguf_file is None and not has_safetensors(folder):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, *_OTHER_WEIGHTS]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {name}: not a folder, and it cannot be loaded from the hub ({first_line(error)})"
        ) from error
    return folder


def load_config(
    name: str,
    folder: Path | None = None,
    classes: Sequence[str] = (),
    *,
    trust_remote_code: bool = False,
    flag: str = "--model",
) -> Any:
    """The configuration of a model on the hub or in ``folder``; ConfigError (of ``flag``) if it has none."""
    try:
        config = AutoConfig.from_pretrained(folder or name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{flag} {name}: it comes with code of its own; --trust_remote_code runs it, if you trust it"
            ) from error
        raise ConfigError(
            f"{flag} {name}: no Hugging Face configuration could be loaded ({first_line(error)}); give a "
            "folder with the config.json of a model that transformers knows, or a model's name on the hub"
        ) from error
    if classes:
        _set_classes(config, classes)
    return config


def _set_classes(config: Any, classes: Sequence[str]) -> None:
    """Gives a classifier the names of the data's classes; one that was trained for these keeps its own."""
    own, wanted = _ids_by_name(config), {name.lower() for name in classes}
    is_named = any(name != f"label_{number}" for name, number in own.items())
    has_numbers = all(name in (str(number), f"LABEL_{number}") for number, name in enumerate(classes))
    is_the_same = own.keys() >= wanted and len(wanted) == len(classes)
    if not (is_the_same or (is_named and has_numbers and len(classes) <= config.num_labels)):
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: number for number, label in enumerate(classes)}


def _ids_by_name(config: Any) -> dict[str, int]:
    return {name.lower(): number for number, name in config.id2label.items()}


def _load_tokenizer(name: str, folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    where = "expected its files beside config.json"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        fault = f"no tokenizer could be loaded ({first_line(error)})"
        raise ConfigError(f"--model {name}: {fault}; {where}") from error
    # Some classes load without files, and then have nothing but their special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(f"--model {name}: it has no tokenizer; {where}")
    return tokenizer
