"""A transformers model with transformers' own initial weights, for training from scratch.

configuration, seed ──► transformers draws the whole model ──► safetensors in the cache ──► Pretrained

Drawn as a whole, the weights are those of ``from_config`` after ``torch.manual_seed``, however it is cut.
"""

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ds_interlock.errors import ConfigError, first_line
from ds_interlock.files import unfinished_folder
from ds_interlock.hf.data.tokenizer import default_cache_dir
from ds_interlock.hf.model.pretrained import Pretrained, empty_model, has_own_code, load_config
from ds_interlock.hf.model.surgery import Skeleton
from ds_interlock.hf.model.weights import has_safetensors
from ds_interlock.sampling import seeded


def configuration(
    name: str,
    overrides: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """The configuration of a model to train from scratch, for the ids of ``tokenizer``.

    Args:
        name: On the hub, a folder, a config.json, or a ``model_type`` of transformers with its default sizes.
        overrides: ``"hidden_size=256,num_hidden_layers=4"``, as ``update_from_string`` takes them.
        tokenizer: Its number of ids is the vocabulary, unless ``overrides`` say ``vocab_size``.
        trust_remote_code: Run code that comes with the configuration.

    Raises:
        ConfigError: If there is no such configuration, or an override is none of its values.
    """
    if name in transformers.CONFIG_MAPPING:
        config = transformers.CONFIG_MAPPING[name]()
    else:
        config = load_config(name, flag="--config_name", trust_remote_code=trust_remote_code)
        vars(config).pop("quantization_config", None)  # new weights are plain numbers
    _set_tokens(config, tokenizer)
    if overrides:
        _override(config, overrides)
    try:
        config.validate()
    except StrictDataclassError as error:
        why = str(error.__cause__ or error)
        raise ConfigError(f"--config_name {name}: its values do not fit each other ({why})") from error
    if config.vocab_size < len(tokenizer):
        need = f"the tokenizer has {len(tokenizer)} ids"
        raise ConfigError(f"--config_overrides: vocab_size is {config.vocab_size}, but {need}")
    return config


def _set_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    config.vocab_size = len(tokenizer)
    for token in ("bos", "eos", "pad"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))


def _override(config: Any, overrides: str) -> None:
    flag = f"--config_overrides {overrides}"
    for pair in overrides.split(","):
        key, equals, value = pair.partition("=")
        if not equals or not hasattr(config, key):
            raise ConfigError(
                f"{flag}: {pair!r} names no value of a {type(config).__name__}; expected pairs such as "
                "hidden_size=256,num_hidden_layers=4"
            )
        kind = type(getattr(config, key)).__name__
        try:
            config.update_from_string(pair)
        except (ValueError, TypeError, StrictDataclassError) as error:
            why = f"{key} is of type {kind}, and {value!r} is not ({first_line(error)})"
            raise ConfigError(f"{flag}: {why}") from error


def draw_weights(
    name: str, config: Any, tokenizer: PreTrainedTokenizerBase, seed: int, dtype: torch.dtype
) -> Pretrained:
    """A model with transformers' initial weights for ``seed``.

    Let one process of a machine do it first: the others then take the weights from the cache. It takes the
    memory of the whole model once. ConfigError if transformers cannot build it, or it cannot be cut.
    """
    Skeleton(empty_model(config, "causal", dtype))  # refuses what cannot be cut, before anything is drawn
    words = repr((config.to_json_string(use_diff=False), seed, transformers.__version__, torch.__version__))
    key = hashlib.sha256(words.encode()).hexdigest()
    folder = default_cache_dir() / f"initial-{config.model_type}-{key[:16]}"
    if not has_safetensors(folder):
        _draw(name, config, seed, folder)
    return Pretrained(name, folder, config, tokenizer, "causal", dtype)


def _draw(name: str, config: Any, seed: int, folder: Path) -> None:
    options = {"trust_remote_code": True} if has_own_code(config) else {}
    try:
        with seeded(seed):
            # A copy, as transformers writes into a configuration what it chose.
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        why = f"transformers cannot build it ({first_line(error)})"
        raise ConfigError(
            f"--config_name {name}: {why}; --config_overrides may not fit each other"
        ) from error
    try:
        with unfinished_folder(folder) as draft:
            model.save_pretrained(draft, save_original_format=False)
    except OSError as error:
        raise ConfigError(
            f"--config_name {name}: its initial weights cannot be written to {folder} ({error}): make room, "
            "or set XDG_CACHE_HOME to a folder with room"
        ) from error
