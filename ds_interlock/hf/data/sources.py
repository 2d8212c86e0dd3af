"""Files and data sets in, records out.

    text files, folders of *.txt         ──► one Document per text
    JSON lines, *.csv, *.parquet         ──► one record per row (``files``)
    a data set                           ──► one record per row of its splits

The first row of a file says which format (``records``) the whole file has.

Lines and documents go into an Arrow file of the library ``datasets``, in its cache, and are mapped from
there: they may be more than memory holds, and the processes of a machine share them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.hf.data.files import is_table, iter_documents, iter_rows, text_files, unit_of
from ds_interlock.hf.data.loading import cache_errors, load_splits, sotu_folder
from ds_interlock.hf.data.records import (
    KEYS,
    Classified,
    Keys,
    Record,
    Task,
    format_of,
    kind_of,
    of_table,
    record_of,
)
from ds_interlock.hf.data.resident import release_pages
from ds_interlock.sampling import split_indices

VALIDATION_SHARE = 0.05  # of the records, if there is no validation data
_READ_TOGETHER = 1000  # rows
_ROW = "__row__"  # the column with the number of a data set's row
_FEATURES = {"value": "string", "source": "int32", "number": "int64"}  # of lines and documents


class Source(NamedTuple):
    """A file, texts, or a split of a data set; ``before`` and ``after`` a row's number say where it is."""

    before: str
    after: str
    format: Keys
    is_json: bool = False
    is_table: bool = False  # all rows have the same keys, at every depth


class Records(Sequence[Record]):
    """The records in rows of a ``datasets.Dataset``, made one by one; DataError if one is malformed."""

    def __init__(
        self, rows: Any, sources: Sequence[Source], task: Task, numbers: Tensor | None = None
    ) -> None:
        self.rows, self.sources, self.task = rows, sources, task
        self.numbers = numbers  # of those that belong to it; None: all

    def __len__(self) -> int:
        return len(self.rows if self.numbers is None else self.numbers)

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), _READ_TOGETHER):
            release_pages()
            some: Any = range(start, min(start + _READ_TOGETHER, len(self)))
            if self.numbers is not None:
                some = self.numbers[start : some.stop].tolist()
            yield from records_in(self.rows[some], self.sources, self.task)

    def __getitem__(self, number: Any) -> Any:
        row = range(len(self.rows))[number] if self.numbers is None else int(self.numbers[number])
        return record_in(self.rows[row], self.sources, self.task)

    def own_rows(self) -> Any:
        """Its rows, without those of other records."""
        import pyarrow as pa

        if self.numbers is None:
            return self.rows
        # As ``select``, which copies the numbers to hash them and makes a list of Python's of them.
        numbers, inner = self.numbers.numpy(), self.rows._indices
        indices = pa.array(numbers, pa.uint64())
        table = pa.table({"indices": indices if inner is None else inner.column(0).take(indices)})
        with pa.BufferOutputStream() as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        key = f"{self.rows._fingerprint}-{hashlib.sha256(numbers.data).hexdigest()[:16]}"
        return self.rows._new_dataset_with_indices(indices_buffer=sink.getvalue(), fingerprint=key)

    def subset(self, numbers: Tensor) -> "Records":
        """The records of these indices."""
        numbers = numbers if self.numbers is None else self.numbers[numbers]
        return Records(self.rows, self.sources, self.task, numbers)


def record_in(row: Mapping[str, Any], sources: Sequence[Source], task: Task, number: int = 0) -> Record:
    """The record in one row of ``Records.rows``, or in row ``number`` of a data set that is streamed."""
    if row.keys() != _FEATURES.keys():  # of a data set
        (source,), number, value = sources, row.get(_ROW, number), _own_columns(row)
    else:
        source, number, value = sources[row["source"]], row["number"], None
    where = f"{source.before}{number}{source.after}"
    if value is None:
        value = _json_object(row["value"], where) if source.is_json else {"text": row["value"]}
    value = of_table(value, where) if source.is_table else value
    return record_of(value, where, task, source.format)


def records_in(rows: Mapping[str, list[Any]], sources: Sequence[Source], task: Task) -> list[Record]:
    """The records in columns of some rows."""
    of_rows = zip(*rows.values(), strict=True)
    return [record_in(dict(zip(rows, values, strict=True)), sources, task) for values in of_rows]


@dataclass(frozen=True)
class RecordData:
    """Records to train on and to validate on, and the id of each class (empty but for classification)."""

    train: Records
    validation: Records
    label_ids: Mapping[int | str, int]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by id, as many as a model must distinguish; empty but for classification."""
        names = {number: str(label) for label, number in self.label_ids.items()}
        return tuple(names.get(number, f"LABEL_{number}") for number in range(max(names, default=-1) + 1))


def load_records(
    train_files: Sequence[str] = (),
    validation_files: Sequence[str] = (),
    dataset: str | None = None,
    dataset_config: str | None = None,
    *,
    task: Task = "causal",
    seed: int = 0,
) -> RecordData:
    """The records of files (see ``read_records``) or of a data set.

    ``dataset`` is "sotu" for the package of that name, else a name for ``datasets.load_dataset``. Without
    validation records a share of the training records, drawn by ``seed``, validates. The task
    "classification" expects classes, "text" documents, "causal" any format but classes. DataError if
    anything is missing or empty. A malformed record raises one when it is read, with the file and the line.
    """
    if bool(train_files) == bool(dataset):
        raise DataError("give either --train_file or --dataset: exactly one of them is the training data")
    validation: Records | None = None
    if not dataset or dataset == "sotu":
        train = read_records([str(sotu_folder())] if dataset else train_files, task)
    else:
        splits = load_splits(dataset, dataset_config)
        train = _records_of_split(splits["train"], f"data set {dataset}, train", task)
        if not train:
            raise DataError(f"data set {dataset!r} is empty: its training split holds no text")
        if "validation" in splits:
            name = f"data set {dataset}, validation"
            validation = _records_of_split(splits["validation"], name, task)
    if validation_files:
        validation = read_records(validation_files, task)
    # Before the split: a class that only the validation share has counts, too.
    label_ids = _label_ids(train) if task == "classification" else {}
    if not validation:
        others, aside = split_indices(len(train), VALIDATION_SHARE, seed)
        train, validation = train.subset(others), train.subset(aside)
    if task == "classification":
        _check_labels(validation, label_ids)
    return RecordData(train, validation, label_ids)


def read_records(paths: Sequence[str], task: Task = "causal") -> Records:
    """The records of all texts, then those of all files with rows."""
    from datasets import Dataset

    files, sources = _files_and_sources(paths, task)
    with cache_errors():
        rows = Dataset.from_generator(_rows, features=_features(), gen_kwargs={"files": files})
    return Records(rows, sources, task)


def stream_of_files(paths: Sequence[str], task: Task = "causal") -> tuple[Any, list[Source]]:
    """The rows of ``read_records``, one after the other; and their sources."""
    from datasets import IterableDataset

    files, sources = _files_and_sources(paths, task)
    stream = IterableDataset.from_generator(_rows, features=_features(), gen_kwargs={"files": files})
    return stream, sources


def _features() -> Any:
    from datasets import Features, Value

    return Features({name: Value(kind) for name, kind in _FEATURES.items()})


def _files_and_sources(paths: Sequence[str], task: Task) -> tuple[list[Any], list[Source]]:
    """Of all texts together, and of each file with rows: what ``_rows`` takes, and what it is."""
    texts = [path for path in paths if not is_table(path)]
    tables = [path for path in paths if is_table(path)]
    if texts and task == "classification":
        raise DataError(
            f'{texts[0]} is plain text: --task classification needs JSON lines with "text" and "label"'
        )
    sources = [Source("document ", f" of {', '.join(texts)}", ("text",))] if texts else []
    for file in tables:
        before = f"{file} {unit_of(file)} "
        number, row = next(iter_rows(file, KEYS))
        keys = format_of(_json_object(row, f"{before}{number}"), f"{before}{number}", task)
        sources.append(Source(before, "", keys, is_json=True, is_table=unit_of(file) == "row"))
    parts = [*([tuple(texts)] if texts else []), *((file,) for file in tables)]
    versions = [[_version(file) for path in part for file in text_files(path)] for part in parts]
    is_json = [source.is_json for source in sources]
    return list(zip(range(len(parts)), parts, is_json, versions, strict=True)), sources


def _version(file: str) -> tuple[str, int, int]:
    """Other contents of a file make other rows."""
    status = Path(file).stat()
    return str(Path(file).absolute()), status.st_size, status.st_mtime_ns


def _rows(files: Sequence[tuple[int, tuple[str, ...], bool, Any]]) -> Iterator[dict[str, Any]]:
    for source, paths, is_json, _ in files:
        values = iter_rows(paths[0], KEYS) if is_json else enumerate(iter_documents(paths), 1)
        for number, value in values:
            yield {"value": value, "source": source, "number": number}


def _records_of_split(split: Any, name: str, task: Task) -> Records:
    """The rows of a split without those of blank text, which data sets of plain text have for blank lines."""
    split = split.add_column(_ROW, range(len(split)))
    if "text" in split.column_names:
        split = split.filter(has_text)
    keys = format_of(_own_columns(split[0]), f"{name} row {split[0][_ROW]}", task) if len(split) else ()
    return Records(split, [Source(f"{name} row ", "", keys, is_table=True)], task)


def _own_columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in row.items() if name != _ROW}


def has_text(row: Mapping[str, Any]) -> bool:
    """Whether a row's "text" is not blank, if it has one, or it is of another format."""
    text = row.get("text", "no text is expected")
    is_blank = isinstance(text, str | None) and not (text or "").strip()
    return not is_blank or row.get("messages") is not None or row.get("prompt") is not None


def _json_object(line: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: malformed JSON ({error.msg} at column {error.colno}); expected one whole object a line"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {kind_of(value)}")
    return value


def _label_ids(train: Sequence[Record]) -> dict[int | str, int]:
    """The id of each class: integers are their own ids, strings are numbered in sorted order."""
    first: Any = train[0]
    labels = set()
    record: Any
    for record in train:
        if isinstance(record.label, str) != isinstance(first.label, str):
            raise DataError(
                f'{record.where}: "label" is {kind_of(record.label)}, and {kind_of(first.label)} in '
                f"{first.where}; use one kind"
            )
        labels.add(record.label)
    return {label: label if isinstance(label, int) else number for number, label in enumerate(sorted(labels))}


def _check_labels(validation: Sequence[Record], label_ids: Mapping[int | str, int]) -> None:
    for record in validation:
        if isinstance(record, Classified) and record.label not in label_ids:
            known = ", ".join(str(label) for label in label_ids)
            raise DataError(
                f"{record.where}: no training record has the label {record.label!r}, only {known}"
            )
