"""The folders of checkpoints: their names, what belongs in them, and whether it is whole.

    checkpoints/
      latest                     the tag of the newest complete checkpoint
      global_step100/
        interlock_files.json     its number in the order of saving, the step, the size of every other file
        layer_00-model_states.pt ...

torch writes its files as zip archives with a checksum (CRC-32) for each part, which it does not compare when
it reads them. ``find_fault`` does.
"""

import json
import lzma
import shutil
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch

from ds_interlock.errors import ConfigError

LIST_FILE = "interlock_files.json"
UNFINISHED = ".unfinished"
REPLACED = ".replaced"

SIZES_ONLY = slice(0)
"""A share of the files to read that is none of them."""


def folder_of(save_dir: Path, tag: str) -> Path:
    """The folder of the checkpoint with this tag.

    Raises:
        ConfigError: If the tag is no name of a folder in ``save_dir``, but leads elsewhere.
    """
    if tag in ("", ".", "..") or Path(tag).name != tag:
        raise ConfigError(f"{tag!r} is no tag of a checkpoint in {save_dir}: expected a name without a path")
    return save_dir / tag


def latest_folder(save_dir: Path) -> Path | None:
    """The folder of the checkpoint that the file ``latest`` names; None without that file."""
    latest = save_dir / "latest"
    return folder_of(save_dir, latest.read_text(encoding="utf-8").strip()) if latest.is_file() else None


def write_list(folder: Path, step: int) -> None:
    """Writes down what is in ``folder``, which is complete, and that no other there is newer."""
    number = 1 + next((_read_list(newest)[0][0] for newest in newest_first(folder.parent)), -1)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LIST_FILE
    }
    listed = {"number": number, "step": step, "files": files}
    (folder / LIST_FILE).write_text(json.dumps(listed, indent=0), encoding="utf-8")


def newest_first(save_dir: Path, prefix: str = "") -> list[Path]:
    """The checkpoints whose tags begin with ``prefix`` and that have a list of their files, whole or not.

    The last saved is first, whatever its step: a run may have gone back to an earlier one, or begun anew.
    Those of earlier versions have no number and go by their steps.
    """
    folders = [path.parent for path in save_dir.glob(f"{prefix}*/{LIST_FILE}")]
    complete = [folder for folder in folders if folder.suffix not in (UNFINISHED, REPLACED)]
    return sorted(complete, key=lambda folder: (_read_list(folder)[0], folder.name), reverse=True)


def newest_complete(save_dir: Path, prefix: str) -> Path | None:
    """The newest checkpoint whose tag begins with ``prefix``, but one that lacks files or parts of them."""
    numbered = newest_first(save_dir, prefix)
    return next((folder for folder in numbered if find_fault(folder, SIZES_ONLY) is None), None)


def remove_oldest(save_dir: Path, prefix: str, limit: int) -> None:
    """Leaves the ``limit`` newest checkpoints of those whose tags begin with ``prefix``."""
    for folder in newest_first(save_dir, prefix)[limit:]:
        shutil.rmtree(folder, ignore_errors=True)


def find_fault(folder: Path, share: slice = slice(None)) -> str | None:
    """What is wrong with a checkpoint, as a sentence; None if nothing is.

    Args:
        folder: Its folder. One without a list, which DeepSpeed or an earlier version wrote, may lack files.
        share: The part of its files to read and compare with their checksums; sizes are compared of all.
    """
    if not folder.is_dir():
        return f"{folder} is missing"
    for name, size in _read_list(folder)[1].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, expected {size}"
    faults = map(_damage, sorted(folder.rglob("*.pt"))[share])
    return next(filter(None, faults), None)


def _damage(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            if file.read(1) == b"\x80":  # a pickle, as torch wrote before it wrote archives
                return None
            with ZipFile(file) as archive:
                damaged = archive.testzip()
        torch._C.PyTorchFileReader(str(path))  # compares headers that zipfile does not
    except (BadZipFile, OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0]
        return f"{path} is damaged ({reason})"
    return f"{path} is damaged ({damaged} differs from its checksum)" if damaged else None


def _read_list(folder: Path) -> tuple[tuple[int, int], dict[str, int]]:
    """Its number and its step, -1 if they are not known; and the sizes of the files in bytes, by name."""
    try:
        listed = json.loads((folder / LIST_FILE).read_text(encoding="utf-8"))
        return (int(listed.get("number", -1)), int(listed["step"])), dict(listed["files"])
    except FileNotFoundError:
        return (-1, -1), {}
    except (ValueError, KeyError, OSError):
        return (-1, -1), {LIST_FILE: 0}  # as it cannot be read
