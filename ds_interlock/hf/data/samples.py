"""Records in, samples out: the tokens of one sequence, and the label at each position.

tokens       a    b    c    d    e          Document, cut into pieces of seq_length + 1 = 4
ids         [a    b    c]  [d]              that overlap by one: each token is a label once
labels      [b    c    d]  [e]

tokens       P    P    C    C   <end>       Completion; Chat alike, with several learned spans
ids         [P    P    C    C]
labels      [-    C    C   <end>]           - is IGNORED_LABEL
"""

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.hf.data.chat import Span, is_learned, render_chat
from ds_interlock.hf.data.records import Chat, Classified, Completion, Document, Record
from ds_interlock.hf.data.tokenizer import end_token_id

_TOGETHER = 1000  # texts given to the tokenizer at once: it works on them in parallel


@dataclass(frozen=True)
class Sample:
    """A sequence, or a classified pair of them.

    A label is the id of the next token, or ``IGNORED_LABEL`` where there is nothing to learn. The last token
    predicts nothing, and is not in ``ids``. Of a classified text the only label is its class.
    """

    ids: list[int]  # of tokens
    labels: list[int]  # one for each position
    token_type_ids: list[int] | None = None  # which text of a pair a token is of, where the tokenizer says it
    segments: list[int] | None = None  # lengths of texts in it that must not see each other; None: it is one

    @property
    def num_labels(self) -> int:
        """How much there is to learn."""
        return len(self.labels) - self.labels.count(IGNORED_LABEL)


class Encoded(NamedTuple):
    """What became of one record."""

    samples: list[Sample]
    was_cut: bool  # at the end; documents never are, they are cut into pieces


def encode_records(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Iterator[Encoded]:
    """Of each record its samples for a language model; every token to be learned is a label once.

    Special tokens are those that the tokenizer adds itself, and one at the end of each document and each
    completion. A chat has those of its template instead. Prompt and completion are joined as they are: a
    space between them must be part of one of them. A sample has at most ``seq_length`` positions. A record
    whose labels are all cut off has none. DataError if the tokenizer lacks what a record needs.
    """
    for record, tokens in zip(records, _tokenise_all(records, tokenizer), strict=True):
        if isinstance(record, Document):
            starts = range(0, len(tokens.ids) - 1, seq_length)
            yield Encoded([_sample(tokens, start, seq_length) for start in starts], False)
        else:
            sample = _sample(tokens, 0, seq_length)
            yield Encoded([sample] if sample.num_labels else [], len(tokens.ids) > seq_length + 1)


def encode_wrapped(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> Iterator[Encoded]:
    """As ``encode_records``, but all tokens follow one another, and are cut into blocks of ``seq_length``.

    So every block is full but the last, and no record is cut off. The blocks are those of the last record. An
    end token is an input, too, and the first token of a text is no label, as it is elsewhere.
    """
    tokens, starts = _Tokens([], []), []
    for one in encode_records(records, tokenizer, sys.maxsize // 2):
        for sample in one.samples:
            starts.append(len(tokens.ids))
            end = [label for label in sample.labels[-1:] if label != IGNORED_LABEL]
            tokens.ids.extend([*sample.ids, *end])
            tokens.targets.extend([IGNORED_LABEL, *sample.labels][: len(sample.ids) + len(end)])
    blocks = []
    for start in range(0, len(tokens.ids) - 1, seq_length):
        block = _sample(tokens, start, seq_length)
        stop = start + len(block.ids)
        inner = starts[bisect_right(starts, start) : bisect_left(starts, stop)]
        segments = [after - before for before, after in pairwise([start, *inner, stop])]
        blocks.append(replace(block, segments=segments))
    yield from (Encoded([], False) for _ in records[1:])
    yield Encoded([block for block in blocks if block.num_labels], False)


def encode_classified(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    label_ids: Mapping[int | str, int],
) -> Iterator[Encoded]:
    """Of each record its sample for a classifier, with the special tokens that the tokenizer adds.

    A sample has at most ``seq_length`` tokens; of a pair the longer text is cut. ``label_ids`` are the
    model's.
    """
    for record in records:
        assert isinstance(record, Classified)
        texts = record.text, record.text_pair
        encoded: Any = tokenizer(*texts, verbose=False)
        is_long = len(encoded["input_ids"]) > seq_length
        if is_long:
            encoded = tokenizer(*texts, verbose=False, truncation=True, max_length=seq_length)
        types = encoded.get("token_type_ids")
        yield Encoded([Sample(encoded["input_ids"], [label_ids[record.label]], types)], is_long)


class _Tokens(NamedTuple):
    """A record's token ids; ``targets`` has ``IGNORED_LABEL`` for those that are not to be learned."""

    ids: list[int]
    targets: list[int]


def _tokenise_all(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Tokens]:
    for kind, group in groupby(records, type):
        alike = list(group)
        for start in range(0, len(alike), _TOGETHER):
            passages = [_passage(record, tokenizer) for record in alike[start : start + _TOGETHER]]
            if kind is Document:
                encoded: Any = tokenizer([text for text, _ in passages], verbose=False)["input_ids"]
                tokens: Iterable[_Tokens] = (_Tokens(ids, ids.copy()) for ids in encoded)
            else:
                tokens = _tokenise_spans(passages, tokenizer, add_special_tokens=kind is Completion)
            yield from tokens if kind is Chat else (_ended(one, tokenizer) for one in tokens)


def _passage(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    match record:
        case Document(text):
            return text, [(0, len(text))]
        case Completion(prompt, completion):
            # One text: its tokens must not depend on where the prompt ends.
            return prompt + completion, [(len(prompt), len(prompt + completion))]
        case Chat():
            return render_chat(record, tokenizer)
        case Classified():
            raise DataError(f"{record.where}: a classified text cannot train a language model")


def _tokenise_spans(
    passages: Sequence[tuple[str, list[Span]]], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> Iterator[_Tokens]:
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not give the characters of each token, which "
            'prompts and chats need: use a "fast" one (PreTrainedTokenizerFast)'
        )
    encoding = tokenizer(
        [text for text, _ in passages],
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        verbose=False,
    )
    for number, (_, spans) in enumerate(passages):
        ids = encoding["input_ids"][number]
        is_special = [text is None for text in encoding.sequence_ids(number)]
        is_target = is_learned(encoding["offset_mapping"][number], is_special, spans)
        targets = [token if keep else IGNORED_LABEL for token, keep in zip(ids, is_target, strict=True)]
        yield _Tokens(ids, targets)


def _ended(tokens: _Tokens, tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    """The tokens with one end token, to be learned, and at most one start token."""
    end = end_token_id(tokenizer)
    start = tokenizer.bos_token_id
    # A text may begin with the start token that the tokenizer adds.
    first = 1 if start is not None and tokens.ids[:2] == [start, start] else 0
    last = len(tokens.ids) - (tokens.ids[-1:] == [end])
    return _Tokens([*tokens.ids[first:last], end], [*tokens.targets[first:last], end])


def _sample(tokens: _Tokens, start: int, seq_length: int) -> Sample:
    end = start + seq_length + 1
    return Sample(tokens.ids[start:end][:-1], tokens.targets[start + 1 : end])
