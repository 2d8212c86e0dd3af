"""The frozen base model's last hidden states for the training samples.

    before the first step                                while it trains
    the pipeline is the base model                       it no longer is

    stage 0   rows of samples ──► ... ──► End            stage 0   (labels, normaliser, base_btd) ──► heads
                                           │                                               ▲
                      hidden_btd ◄─────────┘                                               │ mapped
                          └──► base_states/replica_00.safetensors ─────────────────────────┘

A head that learns from the base model (``interlock.head.kl_weight``) needs the input of its unembedding at
every position. Neither padding nor other samples in its row change a sample's states, so they are stored
sample by sample, without padding, in the order in which the replica evaluated them, which stage 0 knows.

A file is in safetensors' format: one tensor, ``states``, ``[n, d]``, and a fingerprint as metadata. It may be
larger than memory, in which safetensors' own writer needs all tensors: so header and states are written here.

Shape suffixes: b rows, t positions in a row, n positions of all samples of a replica, d hidden width.
"""

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from ds_interlock.errors import ConfigError
from ds_interlock.files import unfinished_file
from ds_interlock.heads.output_layers import first_tensor
from ds_interlock.hf.data.batches import EvaluationBatches
from ds_interlock.hf.data.rows import Row
from ds_interlock.hf.model.cut import End

FOLDER = "base_states"  # in a job's output directory
_STATES = "states"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_WAY_OUT = "set interlock.head.kl_weight to 0"
_LAST_BYTES = 2**20  # of every file of weights: they differ between two models of the same sizes


@dataclass(frozen=True)
class Share:
    """The samples whose states one data-parallel replica stores, in the order of its file."""

    replica: int
    samples: tuple[int, ...]  # indices
    lengths: tuple[int, ...]  # positions of each sample
    row_lengths: tuple[int, ...]  # positions with a sample in every row that the replica evaluates
    fingerprint: dict[str, str]  # identifies the base model, the samples and their order

    @classmethod
    def of(cls, batches: EvaluationBatches, model: str) -> "Share":
        """The share of a replica's batches of all training samples; ``model`` is its ``digest_of_model``."""
        rows = list(chain.from_iterable(batches.rows_of_micro_batches()))
        samples = tuple(chain.from_iterable(rows))
        ids_of = {number: batches.rows.samples[number].ids for number in samples}
        digest = hashlib.sha256()
        for ids in ids_of.values():
            digest.update(array("q", [len(ids), *ids]).tobytes())
        fingerprint = {"model": model, "set of training samples": digest.hexdigest()}
        row_lengths = tuple(sum(len(ids_of[number]) for number in row) for row in rows)
        return cls(batches.replica, samples, tuple(map(len, ids_of.values())), row_lengths, fingerprint)

    def path(self, folder: Path) -> Path:
        """The replica's file."""
        return folder / f"replica_{self.replica:02d}.safetensors"


def digest_of_model(folder: Path) -> str:
    """Identifies the weights in a model's folder without reading all of them."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}\n".encode())
        with path.open("rb") as file:
            file.seek(max(0, num_bytes - _LAST_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def record(
    engine: Any, folder: Path, own: tuple[EvaluationBatches, Share] | None, width: int, dtype: torch.dtype
) -> None:
    """Evaluates all samples once, and stores what the pipeline's ``End`` returns. All ranks must call it.

    ``own`` has the batches of stage 0 and their share, None elsewhere. ConfigError if a file of ``folder``,
    the same for all ranks, cannot be written.
    """
    about: list[Any] = [own and (own[0].num_batches, own[1])]
    if engine.is_pipe_parallel:
        group = engine.grid.get_pipe_parallel_group()
        dist.broadcast_object_list(about, src=dist.get_global_rank(group, 0), group=group)
    num_batches, share = about[0]
    data = own and iter(own[0])
    with _recorded(engine.module, folder, share, width, dtype):
        hidden = None if engine.global_rank == 0 else True  # None: a bar on a terminal only
        for _ in tqdm(range(num_batches), "base model's states", unit="batch", disable=hidden):
            engine.eval_batch(data)
    dist.barrier()  # all files are complete


@contextmanager
def _recorded(module: Any, folder: Path, share: Share, width: int, dtype: torch.dtype) -> Iterator[None]:
    """Within it, what an ``End`` among this stage's layers returns is written to the replica's file."""
    end = next((layer for layer in module.forward_funcs if isinstance(layer, End)), None)
    if end is None:
        yield
        return
    row_lengths, shape = iter(share.row_lengths), (sum(share.lengths), width)
    with new_states_file(share.path(folder), shape, dtype, share.fingerprint) as append:

        def keep(_module: Any, _inputs: Any, hidden: Any) -> None:
            for states_td in first_tensor(hidden):
                append(states_td[: next(row_lengths)])

        with end.register_forward_hook(keep):
            yield


class BaseStates:
    """The states of all samples, mapped from the files of all replicas; ConfigError as of ``map_states``."""

    def __init__(self, folder: Path, shares: Sequence[Share]) -> None:
        self._states_of: dict[int, Tensor] = {}
        for share in shares:
            states_nd = map_states(share.path(folder), share.fingerprint)
            of_samples = torch.split(states_nd, list(share.lengths))
            self._states_of.update(zip(share.samples, of_samples, strict=True))

    def stack(self, rows: Sequence[Row], num_positions: int) -> Tensor:
        """The states of rows of samples, ``[b, t, d]``; 0 after the last sample of a row."""
        like = next(iter(self._states_of.values()))
        base_btd = like.new_zeros(len(rows), num_positions, like.shape[-1])
        for row_td, row in zip(base_btd, rows, strict=True):
            if row:
                states_td = torch.cat([self._states_of[number] for number in row])
                row_td[: len(states_td)] = states_td
        return base_btd


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
            f"--output_dir: {path} is missing: all nodes must share the output directory, and a resumed run "
            f"needs the folder {path.parent.name} that the saved run wrote there; or {_WAY_OUT}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            states_nd: Tensor = file.get_tensor(_STATES)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--output_dir: {path} cannot be read ({error}); {_WAY_OUT}") from error
    differing = [f"another {name}" for name, value in fingerprint.items() if metadata.get(name) != value]
    if differing:
        raise ConfigError(
            f"--output_dir: {path} was written for {' and '.join(differing)}: resume with the model, data "
            f"and batch sizes of the saved run, or {_WAY_OUT}"
        )
    return states_nd


def check_room(folder: Path, num_bytes: int) -> None:
    """Makes ``folder``; ConfigError if its disk has less room than ``num_bytes``."""
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes:
        raise ConfigError(
            f"--output_dir: the base model's hidden states take {num_bytes / 1e9:.2f} GB, and the disk of "
            f"{folder} has {free_bytes / 1e9:.2f} GB left: make room, use --max_train_samples, or {_WAY_OUT}"
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
