"""Micro-batches for stage 0: rows in turn, and the normaliser that makes a batch's loss its token mean.

    samples ──shuffled──► rows ──► batch:   micro-batch 0       micro-batch 1      ...  M-1
                                            replica 0 1 .. R-1  replica 0 1 .. R-1

A micro-batch is ``(inputs, (labels, normaliser))``, or ``(inputs, (labels, normaliser, base))``: the forms
of ``ds_interlock.heads.labels``. DeepSpeed takes the mean of the losses of the M micro-batches of a batch and
of R replicas. With the normaliser (labels in the whole batch) / (M * R) that is the mean over the labels of
the batch, however its rows are distributed. Every replica goes through the same rows, so it knows all labels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.hf.data.rows import Inputs, Row, Rows
from ds_interlock.sampling import ResumableIterator, epoch_order

MicroBatch: TypeAlias = tuple[Inputs, tuple[Tensor, ...]]

PlacesOfRows: TypeAlias = Callable[[Sequence[Row], int], Tensor]
"""From rows and t to places of the base model's hidden states, int64 ``[b, t]``, as ``Places.stack``."""


@dataclass(frozen=True)
class BatchShape:
    """How the rows of a batch are distributed over micro-batches and data-parallel replicas."""

    micro_batch_size: int  # train_micro_batch_size_per_gpu
    num_micro_batches: int  # of a replica in a batch: gradient_accumulation_steps
    num_replicas: int = 1

    @property
    def num_rows(self) -> int:
        """Rows in a batch."""
        return self.micro_batch_size * self.num_micro_batches * self.num_replicas

    def rows_of(self, rows: Sequence[Row], micro_batch: int, replica: int) -> Sequence[Row]:
        """Those of ``rows`` that belong to a replica's micro-batch, counted over all batches."""
        start = (micro_batch * self.num_replicas + replica) * self.micro_batch_size
        return rows[start : start + self.micro_batch_size]

    def normaliser(self, num_labels: int, num_batches: int = 1) -> Tensor:
        """Float32 [1]: the divisor that makes the mean over ``num_batches`` one over ``num_labels``."""
        # Without any label the losses are 0, whatever they are divided by.
        return torch.tensor([max(num_labels, 1) / (self.num_micro_batches * self.num_replicas * num_batches)])


class TrainingBatches(ResumableIterator[MicroBatch]):
    """Endless micro-batches for one data-parallel replica, in an order fixed by the arguments.

    In every epoch the samples are shuffled and put into rows again; the last rows, which fill no batch, are
    left out. DataError if the samples may not fill a batch.
    """

    places_of_rows: PlacesOfRows | None = None
    """If set, where the base model's hidden states for the rows are is the labels' third part."""

    def __init__(self, rows: Rows, shape: BatchShape, *, replica: int = 0, seed: int = 0) -> None:
        if rows.fewest < shape.num_rows:
            raise DataError(
                f"{len(rows.samples)} training samples may fill as few as {rows.fewest} rows of "
                f"{rows.seq_length} positions, and one batch takes {shape.num_rows} "
                f"(train_micro_batch_size_per_gpu {shape.micro_batch_size} x "
                f"gradient_accumulation_steps {shape.num_micro_batches} x {shape.num_replicas} replicas): "
                "give more data, or make one of these smaller in the DeepSpeed config"
            )
        self.rows, self.shape, self.replica, self.seed = rows, shape, replica, seed
        self._begin_epoch(0, first_position=0)

    def __next__(self) -> MicroBatch:
        # Epochs differ in their number of rows, so that of ``position`` is found by going through them.
        if self.position < self._first_position:
            self._begin_epoch(0, first_position=0)
        while self.position >= self._end_position:
            self._begin_epoch(self._epoch + 1, self._end_position)
        number = self.position - self._first_position
        batch = number // self.shape.num_micro_batches * self.shape.num_rows
        num_labels = self.rows.num_labels(self._epoch_rows[batch : batch + self.shape.num_rows])
        rows = self.shape.rows_of(self._epoch_rows, number, self.replica)
        inputs, labels = self.rows.stack(rows)
        base = () if self.places_of_rows is None else (self.places_of_rows(rows, labels.shape[1]),)
        self.position += 1
        return inputs, (labels, self.shape.normaliser(num_labels), *base)

    def fingerprint(self) -> dict[str, int | str]:
        return {
            "num_samples": len(self.rows.samples),
            "num_tokens": self.rows.num_tokens,
            "inputs": ", ".join(self.rows.names),
            "seq_length": self.rows.seq_length,
            **vars(self.shape),
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, int | str]:
        return {**super().state_dict(), "epoch": self._epoch, "first_position": self._first_position}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        super().load_state_dict(state)
        if any(state[name] != size for name, size in vars(self.shape).items()):
            # A normaliser is that of a whole batch, and epochs have whole batches; __next__ finds the epoch.
            self.position -= self.position % self.shape.num_micro_batches
        elif "epoch" in state:
            self._begin_epoch(int(state["epoch"]), int(state["first_position"]))

    def _begin_epoch(self, epoch: int, first_position: int) -> None:
        self._epoch, self._first_position = epoch, first_position
        self._epoch_rows = self.rows.arrange(epoch_order(len(self.rows.samples), self.seed, epoch).numpy())
        num_batches = len(self._epoch_rows) // self.shape.num_rows
        self._end_position = first_position + num_batches * self.shape.num_micro_batches


class EvaluationBatches:
    """All samples once, in ``num_batches`` whole batches; each iteration starts from the first.

    The last batch is filled up with rows of padding. The mean loss over micro-batches, batches and replicas
    is the mean over all labels.
    """

    def __init__(self, rows: Rows, shape: BatchShape, *, replica: int = 0) -> None:
        if not rows.samples:
            raise DataError("no validation sample: expected at least one")
        self.rows, self.shape, self.replica = rows, shape, replica
        self._arranged = rows.arrange(np.arange(len(rows.samples)))
        self.num_batches = -(-len(self._arranged) // shape.num_rows)
        num_labels = int(rows.samples.num_labels.sum())
        self._normaliser = shape.normaliser(num_labels, self.num_batches)

    def rows_of_micro_batches(self) -> Iterator[Sequence[Row]]:
        """The rows of each micro-batch of this replica; the last may be without samples."""
        for number in range(self.num_batches * self.shape.num_micro_batches):
            rows = list(self.shape.rows_of(self._arranged, number, self.replica))
            yield rows + [()] * (self.shape.micro_batch_size - len(rows))

    def __iter__(self) -> Iterator[MicroBatch]:
        for rows in self.rows_of_micro_batches():
            inputs, labels = self.rows.stack(rows)
            yield inputs, (labels, self._normaliser)
