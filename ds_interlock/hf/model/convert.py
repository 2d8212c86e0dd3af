"""Models in other forms, written once as safetensors with the names of their modules, and kept in a cache.

.bin, .gguf, names of another version ──► the model, loaded by transformers ──► a folder in the cache
fp8, mxfp4                            ──► the numbers they stand for ────────────┤
a model that also sees or hears       ──► its text part, under a language model's names ──┘
"""

import hashlib
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AutoQuantizationConfig

from ds_interlock.errors import ConfigError, first_line, first_names
from ds_interlock.files import unfinished_folder
from ds_interlock.hf.model.weights import has_safetensors

_CAN_BE_UNDONE = ("fp8", "mxfp4")  # by transformers, on any device


def converted(
    auto_model: Any,
    folder: Path,
    name: str,
    gguf_file: str | None,
    cache_dir: Path,
    *,
    own_code: bool = False,
    text_part: Any = None,
    quantization: Any = None,
) -> Path:
    """The folder of the model as safetensors with the names of its modules, from the cache or made now.

    Parameters that the files lack are left out. The cache knows a model by its files' sizes and dates.
    ``own_code`` runs code that is in the folder. ``text_part`` is the configuration of the model's text part,
    if only that is wanted, without what it sees or hears. ``quantization`` is what its configuration says of
    weights that are not plain numbers; ConfigError if transformers cannot turn them into some.
    """
    sources = [folder / gguf_file] if gguf_file else sorted(p for p in folder.iterdir() if p.is_file())
    if gguf_file and not sources[0].is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise ConfigError(f"--gguf_file {gguf_file}: not in {folder}; GGUF files there: {there}")
    stamps = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    kind = [auto_model.__name__] + ["text part"] * (text_part is not None) + ["plain"] * bool(quantization)
    key = hashlib.sha256(repr((stamps, *kind, transformers.__version__)).encode()).hexdigest()
    target = cache_dir / f"model-{Path(gguf_file or folder.name).stem}-{key[:16]}"
    if has_safetensors(target):
        return target
    try:
        with unfinished_folder(target) as draft:
            if text_part is None:
                _convert(auto_model, folder, name, gguf_file, draft, own_code, quantization)
            else:
                _convert_text_part(text_part, folder, name, draft)
    except OSError as error:
        raise ConfigError(
            f"--model {name}: its weights must be converted, and {cache_dir} cannot be written ({error}): "
            "make room, or set XDG_CACHE_HOME to a folder with room"
        ) from error
    return target


def copy_companions(source: Path, target: Path, *, own_code: bool) -> None:
    """Copies what belongs to a model besides its weights, configuration and tokenizer."""
    for pattern in ["generation_config.json", *(["*.py"] if own_code else [])]:
        for companion in source.glob(pattern):
            shutil.copy(companion, target)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"--model {name}: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ConfigError(f"--model {name}: transformers cannot load it ({first_line(error)})") from error


def _convert(
    auto_model: Any,
    folder: Path,
    name: str,
    gguf_file: str | None,
    draft: Path,
    own_code: bool,
    quantization: Any,
) -> None:
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    options |= {"trust_remote_code": own_code}
    undo = {"quantization_config": _undone(quantization, name)} if quantization else {}
    dtype = torch.float32 if gguf_file else "auto"
    with _loading(name):
        model, loading = auto_model.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **options, **undo
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if gguf_file:  # its weights are plain numbers now
        model.hf_quantizer = None
        del model.config.quantization_config
    state = {k: v for k, v in model.state_dict().items() if k not in loading["missing_keys"]}
    model.save_pretrained(draft, state_dict=state, save_original_format=False)
    tokenizer.save_pretrained(draft)
    copy_companions(folder, draft, own_code=own_code)


def _undone(quantization: Any, name: str) -> Any:
    method = quantization.get("quant_method")
    if method not in _CAN_BE_UNDONE:
        raise ConfigError(
            f"--model {name}: its weights are quantised (quantization_config in its config.json says "
            f"{method}), and only {' and '.join(_CAN_BE_UNDONE)} can be undone: give the model in full "
            "precision; --load_in_4bit quantises it while it loads"
        )
    config: Any = AutoQuantizationConfig.from_dict(quantization)
    config.dequantize = True
    return config


def _convert_text_part(config: Any, folder: Path, name: str, draft: Path) -> None:
    """Writes the language model that the decoder and the unembedding of a larger model are."""
    whole_config = transformers.AutoConfig.from_pretrained(folder)
    whole_class = getattr(transformers, next(iter(whole_config.architectures or ()), ""), None)
    with _loading(name):
        whole = (whole_class or transformers.AutoModelForImageTextToText).from_pretrained(
            folder, dtype="auto"
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    decoder, unembedding = whole.get_decoder(), whole.get_output_embeddings()
    config.tie_word_embeddings = unembedding.weight is whole.get_input_embeddings().weight
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=whole.dtype)
    state = {f"{model.base_model_prefix}.{key}": tensor for key, tensor in decoder.state_dict().items()}
    state |= {f"lm_head.{key}": tensor for key, tensor in unembedding.state_dict().items()}
    if strange := state.keys() ^ model.state_dict().keys():
        raise ConfigError(
            f"--text_model_only: the text part of {name} is no {type(model).__name__}: only one of them has "
            f"{first_names(sorted(strange))}"
        )
    model.save_pretrained(draft, state_dict=state, save_original_format=False)
    tokenizer.save_pretrained(draft)
    copy_companions(folder, draft, own_code=False)
