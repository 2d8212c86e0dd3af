"""The results of an experiment: one line of JSON for each finished run.

A line is written whole or not at all, even if several runs end at once or the power fails: the file is
written again under another name, which then takes its place.
"""

import fcntl
import json
from pathlib import Path
from typing import Any

from ds_interlock.errors import DataError
from ds_interlock.files import replace_text

RESULTS = Path("docs/experiments")
"""The folder of all results files."""

FORMAT = 1
"""Of a line, and of one without the key. Raise it when a reader of the old lines would be misled."""

Record = dict[str, Any]


def append(path: Path, record: Record) -> None:
    """Adds a run to the file, which is created if necessary. DataError if its lines cannot be read."""
    line = json.dumps({"format": FORMAT, **record}, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, by the end of the process too
        if path.exists():
            read(path)
            line = path.read_text(encoding="utf-8") + line
        replace_text(path, line)


def read(path: Path) -> list[Record]:
    """The runs in the file, in the order in which they ended; none if the file does not exist.

    DataError if a line is no record, or of another version.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        todo = "remove the line, and run the experiment again with --resume"
        raise DataError(f"{place}: not JSON ({error}): {todo}") from error
    version = record.get("format", FORMAT) if isinstance(record, dict) else None
    if version != FORMAT:
        todo = "move the file away, or read it with the other version of this package that wrote it"
        raise DataError(f"{place}: format {version}, expected {FORMAT}: {todo}")
    return record
