"""The data of ``finetune``: files and data sets, tokenised beforehand or while they are streamed.

The ranks of stage 0 read and encode the data; the others get what they must know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from ds_interlock.errors import ConfigError, DataError
from ds_interlock.hf.data.batches import BatchShape, TrainingBatches
from ds_interlock.hf.data.rows import ClassifiedRows, PackedRows, PaddedRows, Rows, padding_id
from ds_interlock.hf.data.samples import encode_classified, encode_records, encode_wrapped
from ds_interlock.hf.data.sources import RecordData, Records, load_records, read_records
from ds_interlock.hf.data.streaming import StreamingBatches, open_stream, rows_of_stream, validation_records
from ds_interlock.hf.data.tokenised import Encode, Samples, identity, mix, tokenise
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.process import broadcast_from_rank_0, hide_progress_bars, in_turns

Training: TypeAlias = TrainingBatches | StreamingBatches


@dataclass(frozen=True)
class Opened:
    """What there is to learn, before a tokenizer is known."""

    parts: Sequence[RecordData]  # one for each weight, or for each data set; none if streamed
    streams: Sequence[Any]  # instead, if streamed
    validation: Sequence[Records]


@dataclass(frozen=True)
class Data:
    """What a rank of stage 0 trains on and validates on."""

    train: Rows | None  # None: it is streamed
    validation: Rows
    batches: Callable[[Any, BatchShape], Training]
    """The batches to train on, for an engine."""

    def describe(self) -> dict[str, Any]:
        """How much there is."""
        about: dict[str, Any] = {"training": "streamed"}
        if self.train is not None:
            about = {"training": self.train.describe()}
        return about | {"validation": self.validation.describe()}


def read_data(args: FinetuneArguments, *, has_data: bool) -> tuple[Opened | None, tuple[str, ...]]:
    """The data, None on ranks without; names of their classes by id. All ranks must call it."""
    hide_progress_bars()
    opened = in_turns(lambda: _open(args) if has_data else None)
    classes = opened.parts[0].classes if opened and opened.parts else ()
    return opened, broadcast_from_rank_0(classes)


def _open(args: FinetuneArguments) -> Opened:
    if args.streaming:
        return _open_streams(args)
    parts = [
        load_records(
            files,
            args.validation_file,
            dataset,
            args.dataset_config,
            task=args.task,
            seed=args.seed,
        )
        for files, dataset in args.parts
    ]
    return Opened(parts, [], [part.validation for part in (parts[:1] if args.validation_file else parts)])


def _open_streams(args: FinetuneArguments) -> Opened:
    config, most = args.dataset_config, args.max_eval_samples
    streams = [open_stream(files, dataset, config) for files, dataset in args.parts]
    if args.validation_file:
        return Opened([], streams, [read_records(args.validation_file)])
    names = [dataset for _, dataset in args.parts if dataset and dataset != "sotu"]
    found = [validation_records(name, config, most) for name in names]
    if not any(found):
        raise DataError(
            "--streaming sets nothing aside: give --validation_file, or a data set with a split named "
            '"validation"'
        )
    return Opened([], streams, [records for records in found if records])


def encode(
    args: FinetuneArguments, opened: Opened | None, pretrained: Pretrained
) -> tuple[Data | None, tuple[str, ...]]:
    """The data in rows, and the names of the model's arguments that they hold. All ranks must call it."""
    data = in_turns(lambda: None if opened is None else _encode(args, opened, pretrained))
    return data, broadcast_from_rank_0(data.validation.names if data else ())


def _encode(args: FinetuneArguments, opened: Opened, pretrained: Pretrained) -> Data:
    tokenizer = pretrained.tokenizer
    vocab_size = pretrained.config.get_text_config().vocab_size
    kind: type[Rows] = PackedRows if args.packing else PaddedRows
    how: dict[str, Any] = {"tokenizer": tokenizer, "seq_length": args.seq_length}
    joins = args.packing and args.packing_strategy == "wrapped"
    encode: Encode = partial(encode_wrapped if joins else encode_records, **how)
    label_ids = opened.parts[0].label_ids if opened.parts else {}
    if args.task == "classification":
        kind, encode = ClassifiedRows, partial(encode_classified, **how, label_ids=label_ids)
    options = [*identity(tokenizer), args.task, args.seq_length, joins, sorted(label_ids.items())]
    fill = partial(kind, seq_length=args.seq_length, pad_id=padding_id(tokenizer, vocab_size))

    def samples_of(parts: Sequence[Records], what: str) -> list[Samples]:
        return [_tokenise(part, encode, options, args, what, vocab_size) for part in parts]

    def rows_of(samples: Samples, most: int | None) -> Rows:
        return fill(samples if most is None else samples.subset(np.arange(min(most, len(samples)))))

    held_out = mix(samples_of(opened.validation, "validation"), None, args.seed)
    validation = rows_of(held_out, args.max_eval_samples)
    if not args.streaming:
        parts = samples_of([part.train for part in opened.parts], "training")
        train = rows_of(mix(parts, args.weights, args.seed), args.max_train_samples)
        return Data(train, validation, partial(_batches, train, args.seed))

    def stream_of_epoch(epoch: int, **place: int) -> Any:
        seed = args.seed * 2**20 + epoch
        return rows_of_stream(opened.streams, args.weights, encode, fill, **place, seed=seed)

    return Data(None, validation, partial(_streaming_batches, stream_of_epoch, fill, args.seed))


def _tokenise(
    records: Records, encode: Encode, options: Any, args: FinetuneArguments, what: str, vocab_size: int
) -> Samples:
    joins = args.packing and args.packing_strategy == "wrapped"
    samples = tokenise(records, encode, options, args.preprocessing_num_workers, joins=joins)
    if dist.get_rank() == 0:
        print(f"{what}: {samples.summary(None if joins else len(records))}")
    if (largest := samples.largest_id()) >= vocab_size:
        raise ConfigError(
            f"--model {args.model}: its tokenizer gives the token id {largest}, and the model knows "
            f"{vocab_size} tokens (vocab_size): tokenizer and weights do not belong together"
        )
    return samples


def _batches(train: Rows, seed: int, engine: Any, shape: BatchShape) -> TrainingBatches:
    return TrainingBatches(train, shape, replica=engine.grid.get_data_parallel_rank(), seed=seed)


def _streaming_batches(
    stream_of_epoch: Any, fill: Any, seed: int, engine: Any, shape: BatchShape
) -> StreamingBatches:
    replica, group = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_group()

    def add_up(number: int) -> int:
        sum_of_all = torch.tensor([number], device=engine.device)
        if shape.num_replicas > 1:
            dist.all_reduce(sum_of_all, group=group)
        return int(sum_of_all.item())

    of_epoch = partial(stream_of_epoch, replica=replica, num_replicas=shape.num_replicas)
    return StreamingBatches(of_epoch, fill, shape, replica=replica, add_up=add_up, seed=seed)
