"""The data of ``finetune`` as samples in rows, tokenised beforehand or while they are streamed.

The ranks of stage 0 read and encode the data; the others get what they must know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch.distributed as dist

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.batches import BatchShape, TrainingBatches
from ds_interlock.hf.data.rows import ClassifiedRows, PackedRows, PaddedRows, Rows, padding_id
from ds_interlock.hf.data.samples import encode_classified, encode_records, encode_wrapped
from ds_interlock.hf.data.sources import Records
from ds_interlock.hf.data.streaming import StreamingBatches, names_of_streams, rows_of_stream
from ds_interlock.hf.data.tokenised import Encode, Samples, identity, mix, tokenise
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.jobs.data import Opened, stream
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.process import broadcast_from_rank_0, in_turns

Training: TypeAlias = TrainingBatches | StreamingBatches


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


def encode(
    args: FinetuneArguments, opened: Opened | None, pretrained: Pretrained
) -> tuple[Data | None, tuple[str, ...]]:
    """The data in rows, and the names of the model's arguments that they hold. All ranks must call it."""
    data = in_turns(lambda: None if opened is None else _encode(args, opened, pretrained))
    return data, broadcast_from_rank_0(data.validation.names if data else ())


def _encode(args: FinetuneArguments, opened: Opened, pretrained: Pretrained) -> Data:
    tokenizer = pretrained.tokenizer
    model_config = pretrained.config.get_text_config()
    vocab_size, pad_id = model_config.vocab_size, padding_id(tokenizer, model_config.vocab_size)
    kind: type[Rows] = PackedRows if args.packing else PaddedRows
    how: dict[str, Any] = {"tokenizer": tokenizer, "seq_length": args.seq_length}
    joins = args.packing and args.packing_strategy == "wrapped"
    encode: Encode = partial(encode_wrapped if joins else encode_records, **how)
    label_ids: dict[int | str, int] = {}
    if args.task == "classification":
        label_ids = pretrained.class_ids(opened.parts[0].label_ids)
        kind, encode = ClassifiedRows, partial(encode_classified, **how, label_ids=label_ids)
        pad_id = model_config.pad_token_id  # as the model knows it
    options = [*identity(tokenizer), args.task, args.seq_length, joins, sorted(label_ids.items())]
    fill = partial(kind, seq_length=args.seq_length, pad_id=pad_id)

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

    of_epoch = partial(rows_of_stream, opened.streams, args.weights, encode, fill)
    sources = names_of_streams(opened.streams, args.weights)
    return Data(None, validation, partial(stream, of_epoch, fill, args.seed, sources))


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
