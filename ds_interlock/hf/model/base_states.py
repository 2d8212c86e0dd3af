"""The frozen base model's hidden states for the training samples, where heads learn from them.

    before the first step                                  while it trains
    the pipeline is the base model                         it no longer is

    stage 0   rows of samples ──► ... ──► End              stage 0   (labels, normaliser, places_bt)
                                   │       │                                              │
                          "reconstruction" "kl"                                           ▼
                                   ▼       ▼                         a stage with a head, loss of the head
         base_states/after_layer_10_...  replica_00.safetensors ──mapped──► [n, d] ──────┘

Objective ``kl`` (``interlock.head.objective``) needs the input of the base model's unembedding, whatever
layer a head follows; ``reconstruction`` what the head itself reads. Neither padding nor other samples in its
row change a sample's states, so they are stored sample by sample, without padding, in the order in which the
replica evaluated them, which stage 0 knows. Its data bring the place of each position in the files of all
replicas, one after the other. The stages with heads map the files.

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
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from ds_interlock.errors import ConfigError
from ds_interlock.files import unfinished_file
from ds_interlock.heads.factory import AuxiliaryHead
from ds_interlock.heads.output_layers import first_tensor
from ds_interlock.hf.data.batches import EvaluationBatches
from ds_interlock.hf.data.rows import Row
from ds_interlock.hf.model.cut import End

FOLDER = "base_states"  # in a job's output directory
_STATES = "states"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_WAY_OUT = 'set interlock.head.objective to "cross_entropy"'
_LAST_BYTES = 2**20  # of every file of weights: they differ between two models of the same sizes


AfterLayer: TypeAlias = int | None
"""How many layers are before the recorded states; None for all but the unembedding."""


@dataclass(frozen=True)
class Share:
    """The samples whose states one data-parallel replica stores, in the order of its file."""

    replica: int
    samples: tuple[int, ...]  # indices
    lengths: tuple[int, ...]  # positions of each sample
    row_lengths: tuple[int, ...]  # positions with a sample in every row that the replica evaluates
    num_batches: int
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
        lengths = tuple(map(len, ids_of.values()))
        return cls(batches.replica, samples, lengths, row_lengths, batches.num_batches, fingerprint)

    def path(self, folder: Path, after_layer: AfterLayer) -> Path:
        """The replica's file."""
        prefix = "" if after_layer is None else f"after_layer_{after_layer}_"
        return folder / f"{prefix}replica_{self.replica:02d}.safetensors"


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


def recorded_layers(module: Any) -> list[AfterLayer]:
    """Where the heads of ``module`` need the base model's states; the same on all stages."""
    objectives = module.head_config.objectives
    of_heads = [head.after_layer for head in module.schedule.heads]
    last: list[AfterLayer] = [None] * ("kl" in objectives and bool(of_heads))
    return last + of_heads * ("reconstruction" in objectives)


def from_stage_0(engine: Any, shares: list[Share]) -> list[Share]:
    """The shares of all replicas, which stage 0 knows, on all stages."""
    if engine.is_pipe_parallel:
        group = engine.grid.get_pipe_parallel_group()
        dist.broadcast_object_list(parcel := [shares], src=dist.get_global_rank(group, 0), group=group)
        (shares,) = parcel
    return shares


def record(
    engine: Any, folder: Path, batches: EvaluationBatches | None, share: Share, width: int, dtype: torch.dtype
) -> None:
    """Evaluates all samples once, and stores what ``recorded_layers`` names. All ranks must call it.

    ``batches`` are None but on stage 0, ``share`` is that of this replica. ConfigError if a file of
    ``folder``, the same for all ranks, cannot be written.
    """
    data = batches and iter(batches)
    with _recorded(engine.module, folder, share, width, dtype):
        hidden = None if engine.global_rank == 0 else True  # None: a bar on a terminal only
        for _ in tqdm(range(share.num_batches), "base model's states", unit="batch", disable=hidden):
            engine.eval_batch(data)
    dist.barrier()  # all files are complete


@contextmanager
def _recorded(module: Any, folder: Path, share: Share, width: int, dtype: torch.dtype) -> Iterator[None]:
    """Within it, what those of the layers that are on this stage return is written to the replica's files."""
    shape = (sum(share.lengths), width)
    with ExitStack() as stack:
        for after_layer in recorded_layers(module):
            if (layer := _layer(module, after_layer)) is not None:
                path = share.path(folder, after_layer)
                append = stack.enter_context(new_states_file(path, shape, dtype, share.fingerprint))
                stack.enter_context(layer.register_forward_hook(_keep(append, iter(share.row_lengths))))
        yield


def _layer(module: Any, after_layer: AfterLayer) -> Any:
    """The layer that returns the states, None if it is not on this stage."""
    layers = module.forward_funcs
    if after_layer is None:
        return next((layer for layer in layers if isinstance(layer, End)), None)
    start = module.parts[module.stage_id]
    return layers[after_layer - 1 - start] if start < after_layer <= start + len(layers) else None


def _keep(append: Callable[[Tensor], None], row_lengths: Iterator[int]) -> Callable[[Any, Any, Any], None]:
    def keep(_module: Any, _inputs: Any, hidden: Any) -> None:
        for states_td in first_tensor(hidden):
            append(states_td[: next(row_lengths)])

    return keep


class Places:
    """Where the states of each sample are: counted through the files of all replicas."""

    def __init__(self, shares: Sequence[Share]) -> None:
        lengths = [length for share in shares for length in share.lengths]
        starts = accumulate(lengths, initial=0)
        samples = chain.from_iterable(share.samples for share in shares)
        self._of_sample = {
            number: range(start, start + length)
            for number, start, length in zip(samples, starts, lengths, strict=False)
        }

    def stack(self, rows: Sequence[Row], num_positions: int) -> Tensor:
        """The places for rows of samples, int64 ``[b, t]``; 0 after the last sample of a row."""
        places_bt = torch.zeros(len(rows), num_positions, dtype=torch.int64)
        for places_t, row in zip(places_bt, rows, strict=True):
            own = [place for number in row for place in self._of_sample[number]]
            places_t[: len(own)] = torch.tensor(own, dtype=torch.int64)
        return places_bt


class BaseStates:
    """From places ``[n]`` to states ``[n, d]``, mapped from the files of all replicas.

    ConfigError as of ``map_states``.
    """

    def __init__(self, folder: Path, shares: Sequence[Share], after_layer: AfterLayer) -> None:
        self._parts = [map_states(share.path(folder, after_layer), share.fingerprint) for share in shares]

    def __call__(self, places_n: Tensor) -> Tensor:
        places_n, start = places_n.cpu(), 0
        states_nd = self._parts[0].new_empty(len(places_n), self._parts[0].shape[1])
        for part_nd in self._parts:
            of_part = (places_n >= start) & (places_n < start + len(part_nd))
            states_nd[of_part] = part_nd[places_n[of_part] - start]
            start += len(part_nd)
        return states_nd


def attach(module: Any, folder: Path, shares: Sequence[Share]) -> None:
    """Gives each head of this stage the states that it learns from; ConfigError as of ``map_states``."""
    plan = module.schedule.plan_with_all_heads
    for loss, head in module.heads.by_loss(plan, module.stage_id).items():
        sources = {"kl": None, "reconstruction": plan.heads[loss].after_layer}
        cast(AuxiliaryHead, head).base_states = {
            objective: BaseStates(folder, shares, sources[objective])
            for objective in sources.keys() & module.head_config.objectives.keys()
        }


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
