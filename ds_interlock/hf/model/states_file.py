"""A file of hidden states: written position by position, and mapped when it is read.

It is a safetensors file with one tensor, ``states``, ``[n, d]``, and a fingerprint of the states as metadata.
It may be larger than memory, and safetensors' own writer takes tensors in memory: so the header is written
here, and then the states as they come.

Shape suffixes: n positions, d hidden width.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_interlock.errors import ConfigError
from ds_interlock.files import unfinished_file

_STATES = "states"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_WAY_OUT = "set interlock.head.kl_weight to 0"
_NEEDED = (
    "Heads with interlock.head.kl_weight learn from the base model until the last step, and its states can "
    "only be computed before the first"
)


@contextmanager
def new_states_file(
    path: Path, shape: tuple[int, int], dtype: torch.dtype, fingerprint: Mapping[str, str]
) -> Iterator[Callable[[Tensor], None]]:
    """Yields a function that appends states to a file, which becomes ``path`` at the end.

    In all ``shape``, ``(n, d)``, must be appended. ``dtype`` is float32 or bfloat16. If the file cannot be
    written, the function raises a ConfigError too, and nothing is left of it.
    """
    num_missing = shape[0]
    with ExitStack() as stack:
        with _disk_errors(path):
            unfinished = stack.enter_context(unfinished_file(path))
            unfinished.write_bytes(_header(shape, dtype, fingerprint))
            file = stack.enter_context(unfinished.open("ab", buffering=0))

        def append(states_nd: Tensor) -> None:
            nonlocal num_missing
            assert states_nd.shape[1] == shape[1], f"{list(states_nd.shape)} is not of width {shape[1]}"
            states_nd = states_nd.detach().to("cpu", dtype).contiguous()
            unwritten = states_nd.view(torch.uint8).flatten().numpy().data
            while unwritten:  # an unbuffered write may be cut short, but its errors come here, not at the end
                with _disk_errors(path):
                    unwritten = unwritten[file.write(unwritten) :]
            num_missing -= len(states_nd)

        yield append
        assert num_missing == 0, f"{num_missing} of {shape[0]} positions were not appended"


def _header(shape: tuple[int, int], dtype: torch.dtype, fingerprint: Mapping[str, str]) -> bytes:
    """The beginning of the file, as safetensors' documentation describes it: a JSON text and its length."""
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    states = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [0, num_bytes]}
    text = json.dumps({"__metadata__": dict(fingerprint), _STATES: states}).encode()
    text += b" " * (-len(text) % 8)  # so that the states are aligned in memory
    return len(text).to_bytes(8, "little") + text


def map_states(path: Path, fingerprint: Mapping[str, str]) -> Tensor:
    """The mapped states ``[n, d]``; ConfigError if the file is missing, damaged or of another fingerprint."""
    if not path.is_file():
        raise ConfigError(
            f"--output_dir: {path} is missing. {_NEEDED}: all nodes must share the output directory, and a "
            f"resumed run needs the folder {path.parent.name} that the saved run wrote there; or {_WAY_OUT}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            states_nd: Tensor = file.get_tensor(_STATES)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--output_dir: {path} cannot be read: {error}. {_NEEDED}") from error
    differing = [name for name, value in fingerprint.items() if metadata.get(name) != value]
    if differing:
        raise ConfigError(
            f"--output_dir: {path} was written for {' and '.join(f'another {name}' for name in differing)}. "
            f"{_NEEDED}: resume with the model, data and batch sizes of the saved run, or {_WAY_OUT}"
        )
    return states_nd


def check_room(folder: Path, num_bytes: int) -> None:
    """Makes ``folder``; ConfigError if its disk has less room than ``num_bytes``."""
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise ConfigError(
            f"--output_dir: the base model's hidden states (interlock.head.kl_weight) take "
            f"{num_bytes / 1e9:.2f} GB, and the disk of {folder} has {free_bytes / 1e9:.2f} GB left: make "
            f"room, train on fewer samples (--max_train_samples), or {_WAY_OUT}"
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--output_dir: the base model's hidden states cannot be written to {path} ({error.strerror}); "
            f"make room, use another folder, or {_WAY_OUT}"
        ) from error
