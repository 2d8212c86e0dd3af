"""The data of ``finetune``: the ranks of stage 0 read and encode it; the others get what they must know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.records import Record
from ds_interlock.hf.data.rows import ClassifiedRows, PackedRows, PaddedRows, Rows, padding_id
from ds_interlock.hf.data.samples import SampleSet, encode_classified, encode_records
from ds_interlock.hf.data.sources import RecordData, load_records
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.process import broadcast_from_rank_0, propagate_errors


@dataclass(frozen=True)
class Records:
    """Records as all ranks need to know them.

    Attributes:
        data: On the ranks of stage 0; None elsewhere.
        classes: Names of the classes by id; empty for language models.
    """

    data: RecordData | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """Samples in rows, ready to be made into batches.

    Attributes:
        train: To train on, on the ranks of stage 0; None elsewhere.
        validation: Likewise.
        names: What the inputs are, by the names of the model's arguments.
    """

    train: Rows[Any] | None
    validation: Rows[Any] | None
    names: tuple[str, ...]


def read(args: FinetuneArguments, *, has_data: bool) -> Records:
    """Reads files or a data set. All ranks must call it."""
    data = None
    with propagate_errors():
        if has_data:
            data = load_records(
                args.train_file,
                args.validation_file,
                args.dataset,
                args.dataset_config,
                task=args.task,
                seed=args.seed,
            )
    classes: list[str] = []
    if data is not None:
        by_id = {number: str(label) for label, number in data.label_ids.items()}
        classes = [by_id.get(number, f"LABEL_{number}") for number in range(data.num_labels)]
    return Records(data, tuple(broadcast_from_rank_0(classes)))


def encode(args: FinetuneArguments, records: Records, pretrained: Pretrained) -> Data:
    """Tokens in rows. All ranks must call it."""
    train: Rows[Any] | None = None
    validation: Rows[Any] | None = None
    with propagate_errors():
        if records.data is not None:
            data, tokenizer = records.data, pretrained.tokenizer
            train = _rows(args, data, data.train, tokenizer, "training", args.max_train_samples)
            validation = _rows(args, data, data.validation, tokenizer, "validation", args.max_eval_samples)
            _check_vocabulary(train, pretrained)
            _check_vocabulary(validation, pretrained)
    return Data(train, validation, broadcast_from_rank_0(train.names if train else ()))


def _check_vocabulary(rows: Rows[Any], pretrained: Pretrained) -> None:
    """The tokenizer must be the model's.

    Raises:
        ConfigError: If it gives tokens that the model does not know.
    """
    largest = max((max(sample.ids) for sample in rows.samples), default=0)
    known = pretrained.config.get_text_config().vocab_size
    if largest >= known:
        raise ConfigError(
            f"--model {pretrained.name}: its tokenizer gives the token id {largest}, and the model knows "
            f"{known} tokens (vocab_size): tokenizer and weights do not belong together"
        )


def _rows(
    args: FinetuneArguments,
    data: RecordData,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    most: int | None,
) -> Rows[Any]:
    encoded: SampleSet[Any]
    if args.task == "classification":
        encoded = encode_classified(records, tokenizer, args.seq_length, data.label_ids)
    else:
        encoded = encode_records(records, tokenizer, args.seq_length)
    if dist.get_rank() == 0:
        print(f"{what}: {encoded.summary()}")
    kind: type[Rows[Any]] = PackedRows if args.packing else PaddedRows
    if args.task == "classification":
        kind = ClassifiedRows
    return kind(encoded.samples[:most], args.seq_length, padding_id(tokenizer))
