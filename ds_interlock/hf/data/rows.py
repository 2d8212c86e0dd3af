"""How samples fill the rows of a micro-batch: padded or packed.

    padded    [a a a a a .]   packed    [a a a a a c c .]
              [b b b . . .]             [b b b d d d d d]

A row is the indices of its samples. A row without samples is all padding, and nothing is learned from it.

Shape suffixes: b rows, t positions.
"""

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.hf.data.samples import Sample
from ds_interlock.hf.data.tokenised import Numbers, Samples

Row: TypeAlias = tuple[int, ...]
Inputs: TypeAlias = Tensor | tuple[Tensor, ...]

_PADDING_MULTIPLE = 8  # padded rows are rounded up to it: fewer shapes, and better for tensor cores
_LISTED = 2**16  # lengths that are a list of Python's at once
_MAX_OPEN_ROWS = 256  # rows that a sample may still join; with more, packing gains little and takes longer


def padding_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """A token id for padding, which is masked; one that a model of ``vocab_size`` tokens can embed.

    Tokenizers often have a padding token that was added after the model was trained.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in ids if token is not None and token in range(vocab_size))


class Arrangement(Sequence[Row]):
    """Rows of sample indices."""

    def __init__(self, samples: Numbers, ends: Numbers | None = None) -> None:
        self.samples = samples  # of the first row, then those of the second one, ...
        self.ends: Any = range(1, len(samples) + 1) if ends is None else ends  # of the rows, in ``samples``

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[row] for row in range(*number.indices(len(self)))]
        start = self.ends[number - 1] if number else 0
        return tuple(self.samples[start : self.ends[number]].tolist())


class Rows(ABC):
    """A way to fill rows of ``seq_length``, what is left with ``pad_id``; DataError if a sample is longer."""

    names: tuple[str, ...]  # what the inputs are, by the names of a Hugging Face model's arguments

    def __init__(self, samples: Sequence[Sample], seq_length: int, pad_id: int = 0) -> None:
        self.samples = samples if isinstance(samples, Samples) else Samples.of(samples)
        self.seq_length, self.pad_id = seq_length, pad_id
        self.num_tokens = int(self.samples.lengths.sum())
        longest = self.samples.lengths.max(initial=0)
        if longest > seq_length:
            raise DataError(f"a sample has {longest} positions: expected at most {seq_length}, --seq_length")

    def describe(self) -> dict[str, int]:
        """How much there is."""
        num_labels = int(self.samples.num_labels.sum())
        return {"samples": len(self.samples), "tokens": self.num_tokens, "labels": num_labels}

    @property
    def fewest(self) -> int:
        """A lower bound of the number of rows, for any order of the samples."""
        return len(self.samples)

    def arrange(self, order: Numbers) -> Arrangement:
        """Rows of all samples, taken in the order of these indices."""
        return Arrangement(order)

    def num_labels(self, rows: Iterable[Row]) -> int:
        """Labels in ``rows`` that are not ignored."""
        return int(self.samples.num_labels[list(chain.from_iterable(rows))].sum())

    def stack(self, rows: Sequence[Row]) -> tuple[Inputs, Tensor]:
        """The inputs, as ``names`` says, and the labels of a micro-batch, all int64."""
        samples = iter(self.samples.take(list(chain.from_iterable(rows))))
        return self.collate([[next(samples) for _ in row] for row in rows])

    @abstractmethod
    def collate(self, rows: Sequence[Sequence[Sample]]) -> tuple[Inputs, Tensor]:
        """As ``stack``, of rows of samples."""


class PaddedRows(Rows):
    """One sample per row, padded on the right to the longest of the micro-batch."""

    names: tuple[str, ...] = ("input_ids", "attention_mask")

    def collate(self, rows: Sequence[Sequence[Sample]]) -> tuple[tuple[Tensor, ...], Tensor]:
        ids = _joined(rows, "ids")
        longest = max(1, *map(len, ids))
        length = min(-(-longest // _PADDING_MULTIPLE) * _PADDING_MULTIPLE, self.seq_length)
        # A row without tokens keeps a 1 in its mask, because softmax over nothing is NaN.
        mask_bt = _padded([[1] * max(1, len(row)) for row in ids], length, 0)
        labels_bt = _padded(_joined(rows, "labels"), length, IGNORED_LABEL)
        return (_padded(ids, length, self.pad_id), mask_bt), labels_bt


class ClassifiedRows(PaddedRows):
    """One text and its class per row; "token_type_ids" come last, if the samples have them."""

    def __init__(self, samples: Sequence[Sample], seq_length: int, pad_id: int = 0) -> None:
        super().__init__(samples, seq_length, pad_id)
        if self.samples and self.samples[0].token_type_ids is not None:  # it is up to the tokenizer
            self.names = (*self.names, "token_type_ids")

    def collate(self, rows: Sequence[Sequence[Sample]]) -> tuple[tuple[Tensor, ...], Tensor]:
        inputs, labels_bt = super().collate(rows)
        if "token_type_ids" in self.names:
            inputs = (*inputs, _padded(_joined(rows, "token_type_ids"), labels_bt.shape[1], 0))
        return inputs, labels_bt[:, 0].clone()


class PackedRows(Rows):
    """Several samples in each row of ``seq_length``; the positions of each begin at 0.

    Hugging Face's masks keep tokens of different samples apart by that; the padding at the end is a segment
    of its own. No label crosses a border, because a sample's labels are all its own tokens.
    """

    names: tuple[str, ...] = ("input_ids", "position_ids")

    @property
    def fewest(self) -> int:
        # Two that are longer than half a row never share one; and all must fit.
        num_long = int((2 * self.samples.lengths > self.seq_length).sum())
        return max(num_long, -(-self.num_tokens // self.seq_length))

    def arrange(self, order: Numbers) -> Arrangement:
        row_of = array("i")  # of each sample in ``order``
        num_rows = 0
        open_rows: list[tuple[int, int]] = []  # (free positions, number of the row), sorted
        for start in range(0, len(order), _LISTED):
            for length in self.samples.lengths[order[start : start + _LISTED]].tolist():
                fit = bisect_left(open_rows, (length, 0))  # the fullest row that still has room
                if fit < len(open_rows):
                    free, row = open_rows.pop(fit)
                else:
                    free, row = self.seq_length, num_rows
                    num_rows += 1
                row_of.append(row)
                insort(open_rows, (free - length, row))
                if len(open_rows) > _MAX_OPEN_ROWS:
                    del open_rows[0]  # the fullest
        rows = np.asarray(row_of)
        return Arrangement(order[np.argsort(rows, kind="stable")], np.bincount(rows).cumsum())

    def collate(self, rows: Sequence[Sequence[Sample]]) -> tuple[Inputs, Tensor]:
        positions = []
        for row in rows:
            lengths = [length for sample in row for length in sample.segments or [len(sample.ids)]]
            padding = self.seq_length - sum(lengths)
            positions.append([position for length in (*lengths, padding) for position in range(length)])
        ids_bt = _padded(_joined(rows, "ids"), self.seq_length, self.pad_id)
        labels_bt = _padded(_joined(rows, "labels"), self.seq_length, IGNORED_LABEL)
        return (ids_bt, torch.tensor(positions)), labels_bt


def _joined(rows: Sequence[Sequence[Sample]], name: str) -> list[list[int]]:
    """The values of that name of each row's samples, concatenated."""
    return [[value for sample in row for value in getattr(sample, name)] for row in rows]


def _padded(rows: Sequence[list[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])
