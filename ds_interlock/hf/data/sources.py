"""Files and data sets in, records out.

    *.txt, folders of *.txt  ──► one Document per text
    *.jsonl, *.json          ──► one record per line, which holds one JSON object
    a data set               ──► one record per row of its splits

The first object of a file says which format (``records``) the whole file has.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ds_interlock.errors import DataError
from ds_interlock.hf.data.records import Classified, Document, Record, Task, kind_of, records_of
from ds_interlock.hf.data.text import VALIDATION_SHARE, read_documents, read_sources
from ds_interlock.sampling import set_aside


@dataclass(frozen=True)
class RecordData:
    """Records to train on and to validate on, and the id of each class (empty but for classification)."""

    train: Sequence[Record]
    validation: Sequence[Record]
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
    "classification" expects classes, "causal" the other formats. DataError if anything is missing, malformed
    or empty; it names the file and the line.
    """
    train, validation = read_sources(
        train_files,
        validation_files,
        dataset,
        dataset_config,
        read=lambda paths: read_records(paths, task),
        read_split=lambda split, name: list(records_of(_rows(split, name), task)),
    )
    label_ids = _label_ids(train)  # before the split: a class that only the validation share has counts, too
    if not validation:
        train, validation = set_aside(train, VALIDATION_SHARE, seed)
    _check_labels(validation, label_ids)
    return RecordData(train, validation, label_ids)


def read_records(paths: Sequence[str], task: Task = "causal") -> list[Record]:
    """The records of all texts (``*.txt``, folders of them), then those of all ``*.jsonl`` and ``*.json``."""
    texts, json_files = [], []
    for path in paths:
        ending = Path(path).suffix.lower()
        if ending in (".jsonl", ".json"):
            json_files.append(Path(path))
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
    records: list[Record] = []
    if texts:
        name = ", ".join(texts)
        documents = enumerate(read_documents(texts), 1)
        records += [Document(text, f"document {number} of {name}") for number, text in documents]
    for file in json_files:
        new = list(records_of(_json_objects(file), task))
        if not new:
            raise DataError(f"{file} is empty: expected one JSON object a line")
        records += new
    return records


def _rows(split: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a split without those of blank text, which data sets of plain text have for blank lines."""
    for number, row in enumerate(split):
        text = row.get("text", "no text is expected")
        if not isinstance(text, str | None) or (text or "").strip():
            yield f"{name} row {number}", row


def _json_objects(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if text := line.removeprefix(BOM_UTF8).rstrip():
                    where = f"{file} line {number}"
                    yield where, _json_object(text, where)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _json_object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason}); convert the file, as with iconv") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: malformed JSON ({error.msg} at column {error.colno}); expected one whole object a line"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {kind_of(value)}")
    return value


def _label_ids(train: Sequence[Record]) -> dict[int | str, int]:
    """The id of each class: integers are their own ids, strings are numbered in sorted order."""
    classified = [record for record in train if isinstance(record, Classified)]
    for record in classified:
        if isinstance(record.label, str) != isinstance(classified[0].label, str):
            raise DataError(
                f'{record.where}: "label" is {kind_of(record.label)}, and {kind_of(classified[0].label)} in '
                f"{classified[0].where}; use one kind"
            )
    labels = sorted({record.label for record in classified}, key=lambda label: cast(Any, label))
    return {label: label if isinstance(label, int) else number for number, label in enumerate(labels)}


def _check_labels(validation: Sequence[Record], label_ids: Mapping[int | str, int]) -> None:
    for record in validation:
        if isinstance(record, Classified) and record.label not in label_ids:
            known = ", ".join(str(label) for label in label_ids)
            raise DataError(
                f"{record.where}: no training record has the label {record.label!r}, only {known}"
            )
