"""The folder of an export: it appears whole, replaces only a model, and is checked for room first."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ds_interlock.errors import ConfigError
from ds_interlock.files import unfinished_folder

_OF_A_MODEL = ("config.json", "adapter_config.json")


@contextmanager
def new_folder(output: str | os.PathLike[str], num_bytes: int, source: Path | None = None) -> Iterator[Path]:
    """Yields a hidden folder to write into, which becomes ``output`` at the end; after an error, nothing.

    Args:
        output: The folder to make. An existing one is replaced only if it holds a model.
        num_bytes: Size of what will be written, compared with the free space first.
        source: A folder that is read for it, and must not be replaced.

    Raises:
        ConfigError: If ``output`` must not be replaced, or cannot be written.
    """
    target = Path(output).resolve()
    _check_replaceable(target, source)
    free_bytes = shutil.disk_usage(_nearest_existing(target)).free
    sizes = f"it takes {num_bytes:,} bytes, and {free_bytes:,} are free there"
    advice = "make room, or give another folder"
    if num_bytes > free_bytes:
        raise ConfigError(f"{output} does not fit on its disk: {sizes}; {advice}")
    try:
        with unfinished_folder(target) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise
        raise ConfigError(f"{output} cannot be written ({error}): {sizes}; {advice}") from error


def _check_replaceable(target: Path, source: Path | None) -> None:
    if source is not None and target in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{target} holds what is to be exported: give another folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file: give a folder")
    if any(target.iterdir()) and not any((target / name).is_file() for name in _OF_A_MODEL):
        raise ConfigError(
            f"{target} is not empty and holds no Hugging Face model that could be replaced (no "
            f"{' or '.join(_OF_A_MODEL)}): give a new folder"
        )


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
