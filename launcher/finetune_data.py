"""The data of ``finetune.py``: read and encoded by the ranks of stage 0; the others are told about it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from job import errors_told_to_all
from transformers import PreTrainedTokenizerBase

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.records import Record
from ds_interlock.hf.data.rows import ClassifiedRows, PackedRows, PaddedRows, Rows, padding_id
from ds_interlock.hf.data.samples import SampleSet, encode_classified, encode_records
from ds_interlock.hf.data.sources import RecordData, load_records
from ds_interlock.hf.model.pretrained import Pretrained


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


def read(args: argparse.Namespace) -> Records:
    """Reads files or a data set. All ranks must call it."""
    data = None
    with errors_told_to_all():
        if _has_data(args):
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
    return Records(data, tuple(_told_by_rank_0(classes)))


def encode(args: argparse.Namespace, records: Records, pretrained: Pretrained) -> Data:
    """Tokens in rows. All ranks must call it."""
    train: Rows[Any] | None = None
    validation: Rows[Any] | None = None
    with errors_told_to_all():
        if records.data is not None:
            data, tokenizer = records.data, pretrained.tokenizer
            train = _rows(args, data, data.train, tokenizer, "training", args.max_train_samples)
            validation = _rows(args, data, data.validation, tokenizer, "validation", args.max_eval_samples)
            check_vocabulary(train, pretrained)
            check_vocabulary(validation, pretrained)
    return Data(train, validation, _told_by_rank_0(train.names if train else ()))


def check_vocabulary(rows: Rows[Any], pretrained: Pretrained) -> None:
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


def _has_data(args: argparse.Namespace) -> bool:
    """Whether this rank is one of stage 0: DeepSpeed numbers the ranks stage by stage."""
    return dist.get_rank() < dist.get_world_size() // int(args.num_stages)


def _rows(
    args: argparse.Namespace,
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


def _told_by_rank_0(value: Any) -> Any:
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]
