"""Samples in a memory-mapped Arrow file, tokenised once.

    Records ──datasets.map(num_proc)──► tokens   [a b c d]   ids [a b c]   labels [b c -]
                                        learned  [1 1 0]
                                        and length, num_labels, largest_id, record, was_cut

The file is in the cache of the library ``datasets``, by a hash of text, tokenizer and options. So a second
run, and the other processes of a machine, find it. Only a few numbers of each sample are in memory.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.hf.data.loading import cache_errors
from ds_interlock.hf.data.records import Record, Task
from ds_interlock.hf.data.resident import release_pages
from ds_interlock.hf.data.samples import Encoded, Sample
from ds_interlock.hf.data.sources import Records, Source, records_in

Numbers: TypeAlias = NDArray[np.integer[Any]]
Encode: TypeAlias = Callable[[Sequence[Record]], Iterable[Encoded]]

_FORM = 2  # of the file; another one makes other files
_OF_SAMPLE = ["tokens", "learned", "token_type_ids", "segments"]  # columns
_READ_TOGETHER = 100_000  # numbers
_ROWS_OF_ONE_PROCESS = 50_000  # with fewer, starting others takes longer


class Samples(Sequence[Sample]):
    """Samples in rows of a ``datasets.Dataset``, as ``columns`` makes them; ``rows`` of it, or all."""

    def __init__(self, data: Any, rows: Numbers | None = None) -> None:
        self.data = data.with_format("arrow")
        all_rows: Numbers = np.arange(len(data), dtype=np.int32 if len(data) < 2**31 else np.int64)
        self.rows = all_rows if rows is None else all_rows[rows]

    @cached_property
    def num_labels(self) -> Numbers:
        """Labels of each sample that are not ignored."""
        return self._numbers("num_labels")

    @cached_property
    def lengths(self) -> Numbers:
        """Positions of each sample."""
        return self._numbers("length")

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Samples":
        """These, in memory."""
        from datasets import Dataset

        return cls(Dataset.from_dict(columns([(0, Encoded(list(samples), False))]), features=features()))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return self.take(range(*number.indices(len(self))))
        return self.take([number])[0]

    def take(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples of these indices."""
        if not len(numbers):
            return []
        release_pages()
        table = self.data[self.rows[list(numbers)].tolist()].select(_OF_SAMPLE)
        return [sample_in(row) for row in table.to_pylist()]

    def summary(self, num_records: int | None = None) -> str:
        """Numbers of samples, tokens, labels, and what became of records that were too long, in one line."""
        text = f"{len(self)} samples, {self.lengths.sum()} tokens, {self.num_labels.sum()} labels"
        if num_cut := int(self._numbers("was_cut").sum()):
            text += f"; {num_cut} longer than --seq_length were cut"
        if num_records and (num_dropped := num_records - len(np.unique(self._numbers("record")))):
            text += f"; {num_dropped} have nothing to learn within --seq_length and are left out"
        return text

    def subset(self, numbers: Numbers) -> "Samples":
        """The samples of these indices."""
        return Samples(self.data, self.rows[numbers])

    def of_records(self, numbers: Numbers, num_records: int) -> "Samples":
        """The samples of the records with these indices, of ``num_records`` in all."""
        is_one = np.zeros(num_records, bool)
        is_one[numbers] = True
        return self.subset(np.flatnonzero(is_one[self._numbers("record")]))

    def largest_id(self) -> int:
        """The largest token id; -1 without any."""
        return int(self._numbers("largest_id").max(initial=-1))

    def _numbers(self, column: str) -> Numbers:
        values, parts = self.data.select_columns(column), []
        for start in range(0, max(len(values), 1), _READ_TOGETHER):
            release_pages()
            parts.append(values[start : start + _READ_TOGETHER][column].to_numpy())
        of_all: Numbers = np.concatenate(parts)
        return of_all[self.rows]


def tokenise(
    records: Records,
    encode: Encode,
    options: Sequence[Any],
    num_processes: int | None = None,
    *,
    joins: bool = False,
) -> Samples:
    """The samples of the records, from the cache if there; ``joins`` if a sample may be of several records.

    ``options`` are all that the result depends on besides the records. DataError if a record is malformed, or
    nothing is left to learn.
    """
    rows = records.own_rows() if joins else records.rows  # whole samples can be told apart later
    how: Any = {"sources": records.sources, "task": records.task, "encode": encode}
    data = map_once(rows, _map_rows, features(), [records.task, *options], num_processes, **how)
    samples = Samples(data)
    if records.numbers is not None and not joins:
        samples = samples.of_records(records.numbers.numpy(), len(rows))
    if not samples:
        raise DataError(
            f"none of the {len(records)} records has anything to learn within --seq_length: make it larger, "
            "or give shorter prompts"
        )
    return samples


def map_once(
    rows: Any,
    function: Callable[..., Any],
    features: Any,
    options: Sequence[Any],
    num_processes: int | None,
    *,
    sources: Sequence[Source],
    **arguments: Any,
) -> Any:
    """``rows.map`` of batches; from the cache if there, by a hash of rows, sources and options.

    In ``num_processes``; None: one for each core, if there are many rows.
    """
    from datasets.fingerprint import Hasher

    if num_processes is None:
        num_processes = os.cpu_count() if len(rows) > _ROWS_OF_ONE_PROCESS else None
    with cache_errors():
        return rows.map(
            function,
            batched=True,
            with_indices=True,
            num_proc=num_processes,
            features=features,
            remove_columns=rows.column_names,
            fn_kwargs={"sources": sources, **arguments},
            new_fingerprint=Hasher.hash([_FORM, rows._fingerprint, sources, *options]),
            desc="tokens",
        )


def mix(parts: Sequence[Samples], weights: Sequence[float] | None, seed: int) -> Samples:
    """All samples of the parts, as ``mixed``."""
    from datasets import concatenate_datasets

    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.data) for part in parts)])
    rows = [part.rows + start for part, start in zip(parts, starts[:-1], strict=True)]
    return Samples(concatenate_datasets([part.data for part in parts]), mixed(rows, weights, seed))


def mixed(parts: Sequence[Numbers], weights: Sequence[float] | None, seed: int) -> Numbers:
    """The numbers of all parts; with weights, the probabilities of parts, as often as they say.

    Then each part is taken in its own order, and again from its start, until each has been taken once.
    """
    from datasets import Dataset, interleave_datasets

    of_all = np.concatenate(parts)
    if weights is None:
        return of_all
    numbers = [Dataset.from_dict({"row": of_part}) for of_part in parts]
    how: Any = {"probabilities": list(weights), "seed": seed, "stopping_strategy": "all_exhausted"}
    # Read from the data set itself, they would take minutes for millions.
    order: Numbers = interleave_datasets(numbers, **how)._indices.column(0).to_numpy()
    return of_all[order]


def identity(tokenizer: Any) -> list[Any]:
    """What tells a tokenizer from others, for ``options``."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # what an earlier call has left
        tokenizer.backend_tokenizer.no_padding()
        vocabulary = tokenizer.backend_tokenizer.to_str()
    else:
        vocabulary = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__name__, vocabulary, special, tokenizer.chat_template]


def features() -> Any:
    """The types of the columns."""
    from datasets import Features, List, Value

    return Features(
        tokens=List(Value("int32")),
        learned=List(Value("bool")),
        token_type_ids=List(Value("int8")),
        segments=List(Value("int32")),
        num_labels=Value("int32"),
        length=Value("int32"),
        largest_id=Value("int32"),
        record=Value("int64"),
        was_cut=Value("bool"),
    )


def columns(encoded: Iterable[tuple[int, Encoded]]) -> dict[str, list[Any]]:
    """The columns of the samples of numbered records."""
    rows = [(number, one.was_cut, sample) for number, one in encoded for sample in one.samples]
    # A label is the next token or ignored; or else it is a class, which stands after the last token.
    last = [max(sample.labels[-1], 0) for *_, sample in rows]
    return {
        "tokens": [[*sample.ids, label] for (*_, sample), label in zip(rows, last, strict=True)],
        "learned": [[label != IGNORED_LABEL for label in sample.labels] for *_, sample in rows],
        "token_type_ids": [sample.token_type_ids for *_, sample in rows],
        "segments": [sample.segments for *_, sample in rows],
        "num_labels": [sample.num_labels for *_, sample in rows],
        "length": [len(sample.ids) for *_, sample in rows],
        "largest_id": [max(sample.ids) for *_, sample in rows],
        "record": [number for number, *_ in rows],
        "was_cut": [was_cut for _, was_cut, _ in rows],
    }


def sample_in(row: Mapping[str, Any]) -> Sample:
    """The sample in one row."""
    tokens, learned = row["tokens"], row["learned"]
    labels = zip(tokens[-len(learned) :], learned, strict=True)
    labels_t = [token if keep else IGNORED_LABEL for token, keep in labels]
    return Sample(tokens[:-1], labels_t, row.get("token_type_ids"), row.get("segments"))


def _map_rows(
    rows: Mapping[str, list[Any]],
    numbers: Sequence[int],
    sources: Sequence[Source],
    task: Task,
    encode: Encode,
) -> dict[str, list[Any]]:
    release_pages()
    return columns(zip(numbers, encode(records_in(rows, sources, task)), strict=True))
