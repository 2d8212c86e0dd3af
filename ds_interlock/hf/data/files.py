"""Files in, texts and rows out; DataError names the file and the line of what cannot be read.

    *.jsonl, *.jsonlines, *.ndjson, *.json    rows: a JSON object a line
    *.csv, *.tsv                              rows; the first line names the columns
    *.parquet                                 rows
    other files, and folders                  documents of plain text

Text is UTF-8, and may be compressed (``*.gz``). Byte-order marks are skipped; lines end in LF, CRLF or CR.
"""

import csv
import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ds_interlock.errors import DataError

_FOLDER = ("*.txt", "*.txt.gz")
_LONGEST = 2**16  # characters of a document without a blank line
_READ_TOGETHER = 1000  # rows of a Parquet file
_LONGEST_FIELD = 2**31 - 1  # characters of a CSV file's field; the module's own limit is 2**17


def is_table(file: str) -> bool:
    """Whether a file holds rows: its name says so."""
    return _ending(file) in _ROWS


def unit_of(file: str) -> str:
    """What numbers the rows of a file."""
    return "row" if _ending(file) == ".parquet" else "line"


def iter_rows(file: str, columns: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Number and JSON text of each row. Of a Parquet file only ``columns``, if it has one of them."""
    is_empty = True
    for row in _ROWS[_ending(file)](file, columns):
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{file} is empty: expected {_EXPECTED.get(_ending(file), 'one JSON object a line')}")


def iter_documents(paths: Sequence[str]) -> Iterator[str]:
    """The documents in text files and in folders of ``*.txt``, in the order of ``paths``.

    Each file is a document. A single file is split at its form feeds or, without any, at blank lines, and at
    a line's end where ``_LONGEST`` characters have none. DataError if a path is missing, if it is not UTF-8
    text, if it begins with a JSON object, or if no document has any text.
    """
    for path in filter(_begins_with_an_object, paths):
        raise DataError(
            f"{path} is read as plain text, but its first line is a JSON object: name the file *.jsonl if it "
            "holds JSON lines"
        )
    files = [file for path in paths for file in text_files(path)]
    separator = None
    if len(files) == 1:
        separator = "\f" if any("\f" in line for _, line in _lines(files[0])) else "\n\n"
    is_empty = True
    for text in (text for file in files for text in _split((line for _, line in _lines(file)), separator)):
        if text.strip():
            is_empty = False
            yield text
    if is_empty:
        raise DataError(f"there is no text in {', '.join(paths)}: expected at least one document")


def text_files(path: str) -> list[str]:
    """The file, or the ``*.txt`` of a folder; DataError if there is none."""
    if Path(path).is_file():
        return [path]
    if not Path(path).is_dir():
        raise DataError(f"text file {path} does not exist: expected a text file or a folder of *.txt")
    files = sorted(str(file) for pattern in _FOLDER for file in Path(path).glob(pattern))
    if not files:
        raise DataError(f"folder {path} holds no *.txt file: expected a document in each")
    return files


def _begins_with_an_object(path: str) -> bool:
    lines = (text for _, text in _lines(path) if text.strip()) if Path(path).is_file() else iter(())
    first = next(lines, "").strip()
    with suppress(ValueError):
        return first.startswith("{") and isinstance(json.loads(first), dict)
    return False


def _ending(file: str) -> str:
    return Path(file.lower().removesuffix(".gz")).suffix


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """The lines, LF at their ends, and their numbers; one by one: a file may be larger than memory."""
    number = 0
    try:
        with gzip.open(file) if file.lower().endswith(".gz") else Path(file).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                text = line.removeprefix(BOM_UTF8).decode()
                if "\0" in text:
                    fault = "not UTF-8 (it has NUL characters, as UTF-16)"
                    raise DataError(f"{file} line {number}: {fault}; convert the file, as with iconv")
                yield number, text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
    except UnicodeDecodeError as error:
        where = f"{file} line {number}"
        raise DataError(f"{where}: not UTF-8 ({error.reason}); convert the file, as with iconv") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: str, error: Exception) -> DataError:
    return DataError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}")


def _split(lines: Iterable[str], separator: str | None) -> Iterator[str]:
    """As ``str.split`` of all lines together, but for ``_LONGEST``; without a separator in one piece."""
    if separator is None:
        yield "".join(lines)
        return
    rest, length = [""], 0
    for line in lines:
        first, *others = (rest[-1] + line).split(separator)
        if others:
            yield "".join([*rest[:-1], first])
            yield from others[:-1]
            rest, length = others[-1:], 0
        elif separator == "\n\n" and length > _LONGEST:
            yield "".join(rest)
            rest, length = ["", line], len(line)
        else:
            rest.append(line)
            length += len(line)
    yield "".join(rest)


def _json_rows(file: str, _columns: Sequence[str]) -> Iterator[tuple[int, str]]:
    for number, line in _lines(file):
        if text := line.rstrip():
            yield number, text


def _csv_rows(file: str, _columns: Sequence[str], delimiter: str) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for values in reader:
            where = f"{file} line {reader.line_num}"
            if not values:
                continue
            if len(values) != len(names):
                raise DataError(
                    f"{where}: {len(values)} fields for the {len(names)} columns in the first line"
                )
            pairs = zip(names, values, strict=True)
            yield reader.line_num, _json({name: _cell(name, value) for name, value in pairs})
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num}: malformed CSV ({error})") from error


def _cell(name: str, value: str) -> str | int | None:
    # Text stays text, even if it looks like a number; a class may be one.
    return int(value) if name == "label" and value.isdecimal() else value or None


def _parquet_rows(file: str, columns: Sequence[str]) -> Iterator[tuple[int, str]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            # Without any of them all names are there to be reported.
            names = [name for name in table.schema_arrow.names if name in columns] or None
            batches = table.iter_batches(_READ_TOGETHER, columns=names)
            yield from enumerate(_json(row) for batch in batches for row in batch.to_pylist())
    except (OSError, ArrowException) as error:
        raise _unreadable(file, error) from error


def _json(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


_ROWS: dict[str, Any] = {
    **dict.fromkeys((".jsonl", ".jsonlines", ".ndjson", ".json"), _json_rows),
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}
_EXPECTED = dict.fromkeys((".csv", ".tsv"), "names of columns, then rows") | {".parquet": "rows"}
