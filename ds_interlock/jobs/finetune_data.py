"""The data of ``finetune``: the ranks of stage 0 read and encode it; the others get what they must know."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.records import Record
from ds_interlock.hf.data.rows import ClassifiedRows, PackedRows, PaddedRows, Rows, padding_id
from ds_interlock.hf.data.samples import SampleSet, encode_classified, encode_records
from ds_interlock.hf.data.sources import RecordData, load_records
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.process import broadcast_from_rank_0, propagate_errors


class Data(NamedTuple):
    """Samples in rows."""

    train: Rows[Any]
    validation: Rows[Any]


def read_data(args: FinetuneArguments, *, has_data: bool) -> tuple[RecordData | None, tuple[str, ...]]:
    """The records, None on ranks without data; names of their classes by id. All ranks must call it."""
    records = None
    names: tuple[str, ...] = ()
    with propagate_errors():
        if has_data:
            files = args.train_file, args.validation_file
            how: dict[str, Any] = {"task": args.task, "seed": args.seed}
            records = load_records(*files, args.dataset, args.dataset_config, **how)
            by_id = {number: str(label) for label, number in records.label_ids.items()}
            names = tuple(by_id.get(number, f"LABEL_{number}") for number in range(records.num_labels))
    return records, broadcast_from_rank_0(names)


def encode(
    args: FinetuneArguments, records: RecordData | None, pretrained: Pretrained
) -> tuple[Data | None, tuple[str, ...]]:
    """The records in rows, and the names of the model's arguments that they hold. All ranks must call it."""

    def fill_rows(some: Sequence[Record], what: str, most: int | None) -> Rows[Any]:
        tokenizer = pretrained.tokenizer
        encoded: SampleSet[Any]
        kind: type[Rows[Any]] = PackedRows if args.packing else PaddedRows
        if args.task == "classification":
            assert records is not None, "there are records to encode"
            kind = ClassifiedRows
            encoded = encode_classified(some, tokenizer, args.seq_length, records.label_ids)
        else:
            encoded = encode_records(some, tokenizer, args.seq_length)
        if dist.get_rank() == 0:
            print(f"{what}: {encoded.summary()}")
        rows = kind(encoded.samples[:most], args.seq_length, padding_id(tokenizer))
        _check_vocabulary(rows, pretrained)
        return rows

    data = None
    with propagate_errors():
        if records is not None:
            data = Data(
                fill_rows(records.train, "training", args.max_train_samples),
                fill_rows(records.validation, "validation", args.max_eval_samples),
            )
    return data, broadcast_from_rank_0(data.train.names if data else ())


def _check_vocabulary(rows: Rows[Any], pretrained: Pretrained) -> None:
    """Refuses a tokenizer that is not the model's."""
    largest = max((max(sample.ids) for sample in rows.samples), default=0)
    known = pretrained.config.get_text_config().vocab_size
    if largest >= known:
        raise ConfigError(
            f"--model {pretrained.name}: its tokenizer gives the token id {largest}, and the model knows "
            f"{known} tokens (vocab_size): tokenizer and weights do not belong together"
        )
