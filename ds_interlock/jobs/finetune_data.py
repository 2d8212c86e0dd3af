"""The data of ``finetune``: the ranks of stage 0 read and encode it; the others get what they must know."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.records import Record
from ds_interlock.hf.data.rows import ClassifiedRows, PackedRows, PaddedRows, Rows, padding_id
from ds_interlock.hf.data.samples import encode_classified, encode_records
from ds_interlock.hf.data.sources import RecordData, load_records
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.process import broadcast_from_rank_0, propagate_errors


class Data:
    """Records, then samples in rows. All ranks must make one and call ``encode``.

    Attributes:
        classes: Names of the classes by id; empty for language models.
        train: Rows to train on, on stage 0 after ``encode``; None elsewhere.
        validation: Likewise.
        names: After ``encode`` what the inputs are, by the names of the model's arguments.
    """

    def __init__(self, args: FinetuneArguments, *, has_data: bool) -> None:
        self.args = args
        self.train: Rows | None = None
        self.validation: Rows | None = None
        self.records: RecordData | None = None
        names: list[str] = []
        with propagate_errors():
            if has_data:
                files = args.train_file, args.validation_file
                how: dict[str, Any] = {"task": args.task, "seed": args.seed}
                data = self.records = load_records(*files, args.dataset, args.dataset_config, **how)
                by_id = {number: str(label) for label, number in data.label_ids.items()}
                names = [by_id.get(number, f"LABEL_{number}") for number in range(data.num_labels)]
        self.classes: tuple[str, ...] = tuple(broadcast_from_rank_0(names))

    def encode(self, pretrained: Pretrained) -> None:
        """Makes tokens in rows."""
        with propagate_errors():
            if self.records is not None:
                args, records = self.args, self.records
                self.train = self._rows(records.train, pretrained, "training", args.max_train_samples)
                self.validation = self._rows(
                    records.validation, pretrained, "validation", args.max_eval_samples
                )
        self.names: tuple[str, ...] = broadcast_from_rank_0(self.train.names if self.train else ())

    def _rows(self, records: Sequence[Record], pretrained: Pretrained, what: str, most: int | None) -> Rows:
        args, tokenizer = self.args, pretrained.tokenizer
        kind: type[Rows] = PackedRows if args.packing else PaddedRows
        if args.task == "classification":
            assert self.records is not None, "there are records to encode"
            kind = ClassifiedRows
            encoded = encode_classified(records, tokenizer, args.seq_length, self.records.label_ids)
        else:
            encoded = encode_records(records, tokenizer, args.seq_length)
        if dist.get_rank() == 0:
            print(f"{what}: {encoded.summary()}")
        rows = kind(encoded.samples[:most], args.seq_length, padding_id(tokenizer))
        _check_vocabulary(rows, pretrained)
        return rows


def _check_vocabulary(rows: Rows, pretrained: Pretrained) -> None:
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
