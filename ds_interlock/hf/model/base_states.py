"""The frozen base model's last hidden states for the training samples.

    before the first step                                while it trains
    the pipeline is the base model                       it no longer is

    stage 0   rows of samples ──► ... ──► End            stage 0   (labels, normaliser, base_btd) ──► heads
                                           │                                               ▲
                      hidden_btd ◄─────────┘                                               │ mapped
                          └──► base_states/replica_00.safetensors ─────────────────────────┘

A head that learns from the base model (``interlock.head.kl_weight``) needs the input of its unembedding at
every position, and no stage could compute that beside its own work. Neither padding nor other samples in its
row change a sample's states, so they are stored sample by sample, without padding, in the order in which the
replica evaluated them. Stage 0 knows that order.

Shape suffixes: b rows, t positions in a row, n positions of all samples of a replica, d hidden width.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from ds_interlock.hf.data.batches import EvaluationBatches
from ds_interlock.hf.data.rows import Row
from ds_interlock.hf.model.cut import End
from ds_interlock.hf.model.states_file import map_states, new_states_file

FOLDER = "base_states"
"""Name of the folder in a job's output directory."""

_LAST_BYTES = 2**20  # of every file of weights: they differ between two models of the same sizes


@dataclass(frozen=True)
class Share:
    """The samples whose states one data-parallel replica stores, in the order of its file.

    Attributes:
        replica: Index of the replica.
        samples: Sample indices.
        lengths: Positions of each.
        row_lengths: Positions with a sample in every row that the replica evaluates; 0 if it has none.
        fingerprint: Identifies the base model, the samples and their order.
    """

    replica: int
    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    row_lengths: tuple[int, ...]
    fingerprint: dict[str, str]

    @classmethod
    def of(cls, batches: EvaluationBatches, model: str) -> "Share":
        """The share of a replica's batches of all training samples; ``model`` is its ``digest_of_model``."""
        rows = list(chain.from_iterable(batches.rows_of_micro_batches()))
        samples = tuple(chain.from_iterable(rows))
        digest = hashlib.sha256()
        length_of = {}
        for number in samples:
            ids = batches.rows.samples[number].ids
            length_of[number] = len(ids)
            digest.update(array("q", [len(ids), *ids]).tobytes())
        row_lengths = (sum(length_of[number] for number in row) for row in rows)
        fingerprint = {"model": model, "set of training samples": digest.hexdigest()}
        return cls(batches.replica, samples, tuple(length_of.values()), tuple(row_lengths), fingerprint)

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
    engine: Any,
    folder: Path,
    batches: EvaluationBatches | None,
    share: Share | None,
    *,
    width: int,
    dtype: torch.dtype,
) -> None:
    """Evaluates all samples once, and stores what the pipeline's ``End`` returns. All ranks must call it.

    Args:
        engine: An ``InterlockEngine`` over the layers of a blueprint.
        folder: Where the files go: the same for all ranks.
        batches: The samples, on stage 0; None elsewhere.
        share: The samples of ``batches``, on stage 0; None elsewhere.
        width: d.
        dtype: Of the states, float32 or bfloat16.

    Raises:
        ConfigError: If a file cannot be written.
    """
    num_batches, share = _broadcast_from_stage_0(engine, (batches.num_batches if batches else 0, share))
    data = None if batches is None else iter(batches)
    with _recorded(engine.module, folder, share, width, dtype):
        hidden = None if engine.global_rank == 0 else True  # None: a bar on a terminal only
        for _ in tqdm(range(num_batches), "base model's states", unit="batch", disable=hidden):
            engine.eval_batch(data)
    dist.barrier()  # all files are complete


def _broadcast_from_stage_0(engine: Any, value: Any) -> Any:
    values = [value]
    if engine.is_pipe_parallel:
        group = engine.grid.get_pipe_parallel_group()
        dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0), group=group)
    return values[0]


@contextmanager
def _recorded(module: Any, folder: Path, share: Share, width: int, dtype: torch.dtype) -> Iterator[None]:
    """Within it, what an ``End`` among this stage's layers returns is written to the replica's file."""
    end = next((layer for layer in module.forward_funcs if isinstance(layer, End)), None)
    if end is None:
        yield
        return
    row_lengths = iter(share.row_lengths)
    shape = sum(share.lengths), width
    with new_states_file(share.path(folder), shape, dtype, share.fingerprint) as append:

        def keep(_module: Any, _inputs: Any, hidden_btd: Tensor) -> None:
            for states_td in hidden_btd:
                append(states_td[: next(row_lengths)])

        handle = end.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


class BaseStates:
    """The states of all samples, mapped from the files of all replicas.

    Args:
        folder: Has the files.
        shares: What is in them, of all replicas.

    Raises:
        ConfigError: If a file is missing, damaged, or of another model or other samples.
    """

    def __init__(self, folder: Path, shares: Sequence[Share]) -> None:
        self._states_of: dict[int, Tensor] = {}
        for share in shares:
            states_nd = map_states(share.path(folder), share.fingerprint)
            of_samples = torch.split(states_nd, list(share.lengths))
            self._states_of.update(zip(share.samples, of_samples, strict=True))

    def stack(self, rows: Sequence[Row], num_positions: int) -> Tensor:
        """The states at the positions of a micro-batch.

        Args:
            rows: The samples of each row.
            num_positions: t.

        Returns:
            ``[b, t, d]`` in the files' dtype; 0 after the last sample of a row.
        """
        like = next(iter(self._states_of.values()))
        base_btd = like.new_zeros(len(rows), num_positions, like.shape[-1])
        for row_td, row in zip(base_btd, rows, strict=True):
            if row:
                states_td = torch.cat([self._states_of[number] for number in row])
                row_td[: len(states_td)] = states_td
        return base_btd
