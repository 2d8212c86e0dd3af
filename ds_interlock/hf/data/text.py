"""Documents in, token blocks out.

    documents ──tokenizer──► tokens   d0 d0 d0 <end> d1 d1 <end> d2 d2 d2 ...   one sequence, in Arrow files
    tokens ──────cut───────► blocks   [d0 d0 d0 <end>] [<end> d1 d1 <end>] ...
    blocks ────shuffled────► micro-batches   (input_bt, label_bt), label[t] is the token after input[t]

A block has seq_length + 1 tokens; two overlap by the one between input and label. Blocks are shuffled
in every epoch and distributed over the data-parallel replicas.

Shape suffixes: b micro-batch, t position.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ds_interlock.errors import DataError
from ds_interlock.hf.data.records import Document, Record
from ds_interlock.hf.data.resident import release_pages
from ds_interlock.hf.data.rows import Rows
from ds_interlock.hf.data.samples import Encoded, Sample
from ds_interlock.hf.data.sources import Records, records_in
from ds_interlock.hf.data.tokenised import Numbers, identity, map_once, mixed
from ds_interlock.hf.data.tokenizer import end_token_id
from ds_interlock.sampling import EpochIterator

Ids: TypeAlias = NDArray[np.int32]

_ENCODED_TOGETHER = 16  # documents: enough for all cores, and what comes back is large


class Documents(Iterable[str]):
    """The texts of records, one by one, each time anew."""

    def __init__(self, *parts: Records) -> None:
        self.parts = parts

    @property
    def key(self) -> str:
        """What tells them from others."""
        return " ".join(f"{part.sources} {part.own_rows()._fingerprint}" for part in self.parts)

    def __iter__(self) -> Iterator[str]:
        return (record.text for record in chain(*self.parts) if isinstance(record, Document))


class Tokens:
    """Token ids in one sequence, which stays in its file; a slice is an int64 tensor of its own."""

    def __init__(self, pieces: Sequence[Ids]) -> None:
        self.pieces = [piece for piece in pieces if len(piece)]
        self._starts = list(accumulate(map(len, self.pieces), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(len(self))
        number, pieces = bisect_right(self._starts, start) - 1, [np.empty(0, np.int32)]
        while start < stop:
            first = self._starts[number]
            pieces.append(self.pieces[number][start - first : stop - first])
            start, number = first + len(self.pieces[number]), number + 1
        return torch.from_numpy(np.concatenate(pieces).astype(np.int64))


def tokenise_documents(
    records: Records, tokenizer: PreTrainedTokenizerBase, num_processes: int | None = None
) -> Tokens:
    """All documents as one sequence of tokens, an end-of-text token after each; from the cache if there."""
    from datasets import Features, List, Value

    data = map_once(
        records.own_rows(),
        _map_documents,
        Features(tokens=List(Value("int32"))),
        ["documents", *identity(tokenizer)],
        num_processes,
        sources=records.sources,
        tokenizer=tokenizer,
    )
    column = data.with_format("arrow")[:]["tokens"]
    return Tokens([lists.flatten().to_numpy() for lists in column.chunks])


def _map_documents(
    rows: Mapping[str, list[Any]], _numbers: Sequence[int], sources: Any, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Ids]]:
    release_pages()
    return {"tokens": list(_tokens_of(records_in(rows, sources, "text"), tokenizer))}


def encode_blocks(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Iterator[Encoded]:
    """As ``TokenBlocks``, for a stream: the blocks of all records are those of the last one."""
    ids = [token for ids in _tokens_of(records, tokenizer) for token in ids.tolist()]
    ends = range(seq_length, len(ids), seq_length)
    yield from (Encoded([], False) for _ in records[1:])
    yield Encoded(
        [Sample(ids[end - seq_length : end], ids[end + 1 - seq_length : end + 1]) for end in ends], False
    )


def _tokens_of(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[Ids]:
    """Of each document, with an end token."""
    end = end_token_id(tokenizer)
    texts = [record.text for record in records if isinstance(record, Document)]
    for start in range(0, len(texts), _ENCODED_TOGETHER):
        encoded = _encode(texts[start : start + _ENCODED_TOGETHER], tokenizer)
        yield from (np.array([*ids, end], np.int32) for ids in encoded)


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not tokenizer.is_fast:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    # Without what a call adds: masks, offsets, and a copy of all of it.
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    return [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]


class TokenBlocks:
    """Tokens cut into blocks of inputs and labels; the last tokens, which fill no block, are left out.

    ``starts`` are the places where blocks begin, if not one after the other.
    """

    def __init__(self, tokens: Tokens, seq_length: int, starts: Numbers | None = None) -> None:
        self.tokens, self.seq_length = tokens, seq_length
        in_turn = np.arange(max(0, (len(tokens) - 1) // seq_length), dtype=np.int64) * seq_length
        self.starts, self.is_mixed = in_turn if starts is None else starts, starts is not None

    def __len__(self) -> int:
        return len(self.starts)

    def stack(self, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The blocks ``numbers`` as one micro-batch (input_bt, label_bt)."""
        release_pages()
        starts = self.starts[list(numbers)].tolist()
        blocks = torch.stack([self.tokens[start : start + self.seq_length + 1] for start in starts])
        return blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous()

    def require(self, num_blocks: int, what: str) -> None:
        """Raises DataError if there are fewer blocks than a batch takes; ``what`` names the text."""
        if len(self) < num_blocks:
            raise DataError(
                f"the {what} text has {len(self.tokens)} tokens, and one batch needs "
                f"{num_blocks * self.seq_length + 1} ({num_blocks} blocks of {self.seq_length}, and one "
                "more): give more text, a smaller --seq_length, or smaller batches in the DeepSpeed config"
            )


def mix_blocks(parts: Sequence[TokenBlocks], weights: Sequence[float] | None, seed: int) -> TokenBlocks:
    """The blocks of all parts, as ``mixed``; none holds tokens of two."""
    if len(parts) == 1:
        return parts[0]
    firsts = accumulate((len(part.tokens) for part in parts), initial=0)
    starts = [part.starts + first for part, first in zip(parts, firsts, strict=False)]
    tokens = Tokens([piece for part in parts for piece in part.tokens.pieces])
    return TokenBlocks(tokens, parts[0].seq_length, mixed(starts, weights, seed))


class BlockRows(Rows):
    """Rows of one whole block each."""

    names = ("input_ids",)

    def collate(self, rows: Sequence[Sequence[Sample]]) -> tuple[Tensor, Tensor]:
        samples = list(chain.from_iterable(rows))
        return torch.tensor([one.ids for one in samples]), torch.tensor([one.labels for one in samples])


class BlockIterator(EpochIterator[tuple[Tensor, Tensor]]):
    """Endless micro-batches of blocks, ``(input_bt, label_bt)``; DataError if there are too few for one."""

    def __init__(
        self,
        blocks: TokenBlocks,
        micro_batch_size: int,
        *,
        replica: int = 0,
        num_replicas: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        blocks.require(micro_batch_size * num_replicas, "given")
        self.blocks = blocks
        place = {"replica": replica, "num_replicas": num_replicas}
        super().__init__(len(blocks), micro_batch_size, **place, seed=seed, shuffle=shuffle)

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self.blocks.stack(self.next_indices().tolist())

    def fingerprint(self) -> dict[str, int | str]:
        sizes = {"num_tokens": len(self.blocks.tokens), "seq_length": self.blocks.seq_length}
        if self.blocks.is_mixed:
            sizes["num_blocks"] = len(self.blocks)
        return {**sizes, **super().fingerprint()}


def unigram_perplexity(train: Iterable[Ids], validation_tokens: Tensor, vocab_size: int) -> float:
    """Perplexity on ``validation_tokens`` of the token frequencies in all of ``train``, plus one each."""
    counts = torch.ones(vocab_size, dtype=torch.float64)
    for piece in train:
        release_pages()
        counts += torch.from_numpy(np.bincount(piece, minlength=vocab_size))
    log_probabilities = (counts / counts.sum()).log()
    return math.exp(-log_probabilities[validation_tokens].mean().item())
