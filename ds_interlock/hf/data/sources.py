"""Files and data sets in, records out.

    *.txt, folders of *.txt  ──► one Document per text
    *.jsonl, *.json          ──► one record per line, which holds one JSON object
    a data set               ──► one record per row of its splits

The first object of a file says which format (``records``) the whole file has.

Lines and documents go into an Arrow file of the library ``datasets``, in its cache, and are mapped from
there: they may be more than memory holds, and the processes of a machine share them.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.hf.data.records import Classified, Keys, Record, Task, format_of, kind_of, record_of
from ds_interlock.hf.data.text import VALIDATION_SHARE, iter_documents, read_sources, text_files
from ds_interlock.sampling import split_indices

_ROW = "__row__"  # the column with the number of a data set's row
_FEATURES = {"value": "string", "source": "int32", "number": "int64"}  # of lines and documents


class Source(NamedTuple):
    """A file, texts, or a split of a data set; ``before`` and ``after`` a row's number say where it is."""

    before: str
    after: str
    format: Keys
    is_json: bool = False


class Records(Sequence[Record]):
    """The records in rows of a ``datasets.Dataset``, made one by one; DataError if one is malformed."""

    def __init__(
        self, rows: Any, sources: Sequence[Source], task: Task, numbers: Tensor | None = None
    ) -> None:
        self.rows, self.sources, self.task = rows, sources, task
        self.numbers = numbers  # of those that belong to it; None: all

    def __len__(self) -> int:
        return len(self.rows if self.numbers is None else self.numbers)

    def __getitem__(self, number: Any) -> Any:
        row = range(len(self.rows))[number] if self.numbers is None else int(self.numbers[number])
        return record_in(self.rows[row], self.sources, self.task)

    def subset(self, numbers: Tensor) -> "Records":
        """The records of these indices."""
        numbers = numbers if self.numbers is None else self.numbers[numbers]
        return Records(self.rows, self.sources, self.task, numbers)


def record_in(row: Mapping[str, Any], sources: Sequence[Source], task: Task, number: int = 0) -> Record:
    """The record in one row of ``Records.rows``, or in row ``number`` of a data set that is streamed."""
    if row.keys() != _FEATURES.keys():  # of a data set
        (source,), number, value = sources, row.get(_ROW, number), row
    else:
        source, number, value = sources[row["source"]], row["number"], None
    where = f"{source.before}{number}{source.after}"
    if value is None:
        value = _json_object(row["value"], where) if source.is_json else {"text": row["value"]}
    return record_of(value, where, task, source.format)


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
    """The records of files (see ``read_records``) or of a data set (see ``text.read_sources``).

    Without validation records a share of the training records, drawn by ``seed``, validates. The task
    "classification" expects classes, "causal" the other formats. DataError if anything is missing or empty.
    A record that is malformed raises one when it is read; it names the file and the line.
    """
    train, validation = read_sources(
        train_files,
        validation_files,
        dataset,
        dataset_config,
        read=lambda paths: read_records(paths, task),
        read_split=lambda split, name: _records_of_split(split, name, task),
    )
    # Before the split: a class that only the validation share has counts, too.
    label_ids = _label_ids(train) if task == "classification" else {}
    if not validation:
        others, aside = split_indices(len(train), VALIDATION_SHARE, seed)
        train, validation = train.subset(others), train.subset(aside)
    if task == "classification":
        _check_labels(validation, label_ids)
    return RecordData(train, validation, label_ids)


def read_records(paths: Sequence[str], task: Task = "causal") -> Records:
    """The records of all texts (``*.txt``, folders of them), then those of all ``*.jsonl`` and ``*.json``."""
    from datasets import Dataset

    files, sources = _files_and_sources(paths, task)
    with cache_errors():
        rows = Dataset.from_generator(_rows, features=_features(), gen_kwargs={"files": files})
    return Records(rows, sources, task)


@contextmanager
def cache_errors() -> Iterator[None]:
    """Within it the library ``datasets`` writes: DataError if it cannot, or of the data themselves."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, DataError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        raise DataError(
            f"the cache of datasets cannot be written ({cause}): make room, or set HF_DATASETS_CACHE to a "
            "folder with room"
        ) from error


def stream_of_files(paths: Sequence[str]) -> tuple[Any, list[Source]]:
    """The rows of ``read_records``, for a language model, one after the other; and their sources."""
    from datasets import IterableDataset

    files, sources = _files_and_sources(paths, "causal")
    stream = IterableDataset.from_generator(_rows, features=_features(), gen_kwargs={"files": files})
    return stream, sources


def _features() -> Any:
    from datasets import Features, Value

    return Features({name: Value(kind) for name, kind in _FEATURES.items()})


def _files_and_sources(paths: Sequence[str], task: Task) -> tuple[list[Any], list[Source]]:
    """Of all texts together, and of each file of JSON lines: what ``_rows`` takes, and what it is."""
    texts, json_files = [], []
    for path in paths:
        ending = Path(path).suffix.lower()
        if ending in (".jsonl", ".json"):
            json_files.append(path)
        elif ending == ".txt" or Path(path).is_dir():
            texts.append(path)
        else:
            raise DataError(
                f"{path} ends in {ending!r}: expected .txt (documents), .jsonl or .json (an object a line)"
            )
    if texts and task == "classification":
        raise DataError(
            f'{texts[0]} is plain text: --task classification needs JSON lines with "text" and "label"'
        )
    sources = [Source("document ", f" of {', '.join(texts)}", ("text",))] if texts else []
    for file in json_files:
        number, line = next(_lines(file))
        where = f"{file} line {number}"
        keys = format_of(_json_object(line, where), where, task)
        sources.append(Source(f"{file} line ", "", keys, is_json=True))
    parts = [*([tuple(texts)] if texts else []), *((file,) for file in json_files)]
    versions = [[_version(file) for path in part for file in text_files(Path(path))] for part in parts]
    is_json = [source.is_json for source in sources]
    return list(zip(range(len(parts)), parts, is_json, versions, strict=True)), sources


def _version(file: Path) -> tuple[str, int, int]:
    """Other contents of a file make other rows."""
    status = file.stat()
    return str(file.absolute()), status.st_size, status.st_mtime_ns


def _rows(files: Sequence[tuple[int, tuple[str, ...], bool, Any]]) -> Iterator[dict[str, Any]]:
    for source, paths, is_json, _ in files:
        values = _lines(paths[0]) if is_json else enumerate(iter_documents(paths), 1)
        for number, value in values:
            yield {"value": value, "source": source, "number": number}


def _records_of_split(split: Any, name: str, task: Task) -> Records:
    """The rows of a split without those of blank text, which data sets of plain text have for blank lines."""
    split = split.add_column(_ROW, range(len(split)))
    if "text" in split.column_names:
        split = split.filter(has_text)
    keys = format_of(split[0], f"{name} row {split[0][_ROW]}", task) if len(split) else ()
    return Records(split, [Source(f"{name} row ", "", keys)], task)


def has_text(row: Mapping[str, Any]) -> bool:
    """Whether a row's "text" is not blank, if it has one."""
    text = row.get("text", "no text is expected")
    return not isinstance(text, str | None) or bool((text or "").strip())


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, and their numbers; DataError if there is none."""
    number, is_empty = 0, True
    try:
        with Path(file).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if text := line.removeprefix(BOM_UTF8).rstrip():
                    yield number, text.decode("utf-8")
                    is_empty = False
    except UnicodeDecodeError as error:
        where = f"{file} line {number}"
        raise DataError(f"{where}: not UTF-8 ({error.reason}); convert the file, as with iconv") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if is_empty:
        raise DataError(f"{file} is empty: expected one JSON object a line")


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
