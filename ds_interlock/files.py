"""Files and folders that are written whole, and JSON files that are read into records.

An interrupted write leaves what was there before.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ds_interlock.errors import ConfigError, list_faults

Record = TypeVar("Record", bound=BaseModel)

_MOST_FAULTS = 10


def read_record(path: str | os.PathLike[str], kind: type[Record], *, what: str, hint: str) -> Record:
    """Reads a JSON file into a pydantic model, or raises a ConfigError that says what is wrong with it.

    ``what`` is what to call such a file, as "profile", and ``hint`` what to do if it cannot be used.
    """
    try:
        return kind.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except ValidationError as error:
        faults = faults_of(error)[:_MOST_FAULTS]
        raise ConfigError(f"{list_faults(f'{path} is not a {what}', faults)}; {hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the {what}: {error}; {hint}") from error


def faults_of(error: ValidationError) -> list[str]:
    """What pydantic complains of, a line for each key."""
    return [
        f"{'.'.join(map(str, detail['loc'])) or 'the file'}: {detail['msg']}" for detail in error.errors()
    ]


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` to ``path`` in UTF-8; makes its folder if needed."""
    with unfinished_file(Path(path)) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def unfinished_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write a file to; it is renamed to ``target`` when the block ends well.

    The folder is made if needed. After an error nothing is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".unfinished")
    try:
        yield draft
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` to write into; it is renamed to ``target`` when the block ends well.

    A previous ``target`` is removed only then. After an error nothing is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        yield draft
        replace_folder(target, draft, draft.with_name(draft.name + ".old"))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def replace_folder(target: Path, source: Path, aside: Path) -> None:
    """Renames ``source`` to ``target``, a previous ``target`` to ``aside``, which is removed in the end.

    If the second rename fails, ``aside`` becomes ``target`` again. All three are on one file system.
    """
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    try:
        source.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
