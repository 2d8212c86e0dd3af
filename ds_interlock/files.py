"""Files and folders that appear whole: an interrupted write leaves the previous one as it was."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """Renames ``source`` to ``target``. All three are on one file system.

    Args:
        target: May exist.
        source: The complete new folder.
        aside: Name of the previous ``target`` between the two renames. It is removed in the end; if the
            second rename fails, it becomes ``target`` again.
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
