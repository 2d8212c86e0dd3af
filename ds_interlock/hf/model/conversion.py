"""Weights that are not safetensors, or not under the names of the modules: converted once, and cached.

pytorch_model.bin, *.gguf ──► transformers ──► model.safetensors, config.json, tokenizer in the cache
"""

import hashlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from ds_interlock.errors import ConfigError
from ds_interlock.files import unfinished_folder
from ds_interlock.hf.model.weights import has_safetensors


def converted(auto_model: Any, folder: Path, name: str, gguf_file: str | None, cache_dir: Path) -> Path:
    """The folder of the model as safetensors with the names of its modules, from the cache or made now.

    Parameters that the files lack, such as a new classifier's, are left out. In the cache a model is found by
    a hash of its files' sizes and dates. ``name`` is the model as the user named it, for messages.

    Raises:
        ConfigError: If there is no such file, transformers cannot load it, or the cache cannot be written.
    """
    sources = [folder / gguf_file] if gguf_file else sorted(p for p in folder.iterdir() if p.is_file())
    if gguf_file and not sources[0].is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise ConfigError(f"--gguf_file {gguf_file}: not in {folder}; GGUF files there: {there}")
    stamps = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    key = hashlib.sha256(repr((stamps, auto_model.__name__, transformers.__version__)).encode()).hexdigest()
    target = cache_dir / f"model-{Path(gguf_file or folder.name).stem}-{key[:16]}"
    if has_safetensors(target):
        return target
    try:
        with unfinished_folder(target) as draft:
            _convert(auto_model, folder, name, gguf_file, draft)
    except OSError as error:
        raise ConfigError(
            f"--model {name}: its weights must be converted, and {cache_dir} cannot be written ({error}): "
            "make room, or set XDG_CACHE_HOME to a folder with room"
        ) from error
    return target


def _convert(auto_model: Any, folder: Path, name: str, gguf_file: str | None, draft: Path) -> None:
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    dtype = torch.float32 if gguf_file else "auto"
    try:
        model, loading = auto_model.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except ImportError as error:
        raise ConfigError(f"--model {name}: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ConfigError(f"--model {name}: transformers cannot load it ({first_line(error)})") from error
    if gguf_file:  # its weights are plain numbers now
        model.hf_quantizer = None
        del model.config.quantization_config
    state = {k: v for k, v in model.state_dict().items() if k not in loading["missing_keys"]}
    model.save_pretrained(draft, state_dict=state, save_original_format=False)
    tokenizer.save_pretrained(draft)
    for extra in folder.glob("generation_config.json"):
        shutil.copy(extra, draft)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
