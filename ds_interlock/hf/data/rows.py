"""How samples fill the rows of a micro-batch: padded or packed.

    padded    [a a a a a .]   packed    [a a a a a c c .]
              [b b b . . .]             [b b b d d d d d]

A row is the indices of its samples. A row without samples is all padding, and nothing is learned from it.

Shape suffixes: b rows, t positions.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.hf.data.samples import Sample

Row: TypeAlias = tuple[int, ...]
Inputs: TypeAlias = Tensor | tuple[Tensor, ...]

_PADDING_MULTIPLE = 8  # padded rows are rounded up to it: fewer shapes, and better for tensor cores
_MAX_OPEN_ROWS = 256  # rows that a sample may still join; with more, packing gains little and takes longer


def padding_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """A token id for padding, which is masked; one that a model of ``vocab_size`` tokens can embed.

    Tokenizers often have a padding token that was added after the model was trained.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in ids if token is not None and token in range(vocab_size))


class Rows(ABC):
    """A way to fill rows of ``seq_length``, what is left with ``pad_id``; DataError if a sample is longer."""

    names: tuple[str, ...]  # what the inputs are, by the names of a Hugging Face model's arguments

    def __init__(self, samples: Sequence[Sample], seq_length: int, pad_id: int = 0) -> None:
        self.samples, self.seq_length, self.pad_id = samples, seq_length, pad_id
        self._ids = [sample.ids for sample in samples]
        self._labels = [sample.labels for sample in samples]
        self._num_labels = [sample.num_labels for sample in samples]
        longest = max(map(len, self._ids), default=0)
        if longest > seq_length:
            raise DataError(f"a sample has {longest} positions: expected at most {seq_length}, --seq_length")

    @property
    def fewest(self) -> int:
        """A lower bound of the number of rows, for any order of the samples."""
        return len(self.samples)

    def arrange(self, order: Iterable[int]) -> list[Row]:
        """Rows of all samples, taken in the order of these indices."""
        return [(number,) for number in order]

    def num_labels(self, rows: Iterable[Row]) -> int:
        """Labels in ``rows`` that are not ignored."""
        return sum(self._num_labels[number] for number in chain.from_iterable(rows))

    @abstractmethod
    def stack(self, rows: Sequence[Row]) -> tuple[Inputs, Tensor]:
        """The inputs, as ``names`` says, and the labels of a micro-batch, all int64."""


class PaddedRows(Rows):
    """One sample per row, padded on the right to the longest of the micro-batch."""

    names: tuple[str, ...] = ("input_ids", "attention_mask")

    def stack(self, rows: Sequence[Row]) -> tuple[tuple[Tensor, ...], Tensor]:
        ids = _joined(self._ids, rows)
        longest = max(1, *map(len, ids))
        length = min(-(-longest // _PADDING_MULTIPLE) * _PADDING_MULTIPLE, self.seq_length)
        # A row without tokens keeps a 1 in its mask, because softmax over nothing is NaN.
        mask_bt = _padded([[1] * max(1, len(row)) for row in ids], length, 0)
        labels_bt = _padded(_joined(self._labels, rows), length, IGNORED_LABEL)
        return (_padded(ids, length, self.pad_id), mask_bt), labels_bt


class ClassifiedRows(PaddedRows):
    """One text and its class per row; "token_type_ids" come last, if the samples have them."""

    def __init__(self, samples: Sequence[Sample], seq_length: int, pad_id: int = 0) -> None:
        super().__init__(samples, seq_length, pad_id)
        self._type_ids = [sample.token_type_ids or [] for sample in samples]
        if all(sample.token_type_ids is not None for sample in samples):
            self.names = (*self.names, "token_type_ids")

    def stack(self, rows: Sequence[Row]) -> tuple[tuple[Tensor, ...], Tensor]:
        inputs, labels_bt = super().stack(rows)
        if "token_type_ids" in self.names:
            inputs = (*inputs, _padded(_joined(self._type_ids, rows), labels_bt.shape[1], 0))
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
        lengths = [len(ids) for ids in self._ids]
        num_long = sum(2 * length > self.seq_length for length in lengths)
        return max(num_long, -(-sum(lengths) // self.seq_length))

    def arrange(self, order: Iterable[int]) -> list[Row]:
        rows: list[list[int]] = []
        open_rows: list[tuple[int, int]] = []  # (free positions, number of the row), sorted
        for number in order:
            length = len(self._ids[number])
            fit = bisect_left(open_rows, (length, 0))  # the fullest row that still has room
            if fit < len(open_rows):
                free, row = open_rows.pop(fit)
            else:
                free, row = self.seq_length, len(rows)
                rows.append([])
            rows[row].append(number)
            insort(open_rows, (free - length, row))
            if len(open_rows) > _MAX_OPEN_ROWS:
                del open_rows[0]  # the fullest
        return [tuple(row) for row in rows]

    def stack(self, rows: Sequence[Row]) -> tuple[Inputs, Tensor]:
        positions = []
        for row in rows:
            lengths = [len(self._ids[number]) for number in row]
            padding = self.seq_length - sum(lengths)
            positions.append([position for length in (*lengths, padding) for position in range(length)])
        ids_bt = _padded(_joined(self._ids, rows), self.seq_length, self.pad_id)
        labels_bt = _padded(_joined(self._labels, rows), self.seq_length, IGNORED_LABEL)
        return (ids_bt, torch.tensor(positions)), labels_bt


def _joined(values: Sequence[Sequence[int]], rows: Sequence[Row]) -> list[list[int]]:
    """The values of each row's samples, concatenated."""
    return [[value for number in row for value in values[number]] for row in rows]


def _padded(rows: Sequence[list[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])
