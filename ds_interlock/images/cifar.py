"""CIFAR-10 and CIFAR-100 from a folder, in the two forms that their authors publish.

    python version    data_batch_1 .. data_batch_5, test_batch    (CIFAR-100: train, test)      pickles
    binary version    the same names with .bin                    label bytes, then 3072 pixels an image

Source: Krizhevsky: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.images.data import ImageData, Images

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32

_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
)

# All that the pickles of arrays consist of. Anything else in a pickle could run code of its author's.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class CifarForm:
    """How one of the two data sets is published.

    Attributes:
        name: As people call it.
        num_classes: Number of labels.
        train_files: Names of the training files, without ``.bin``.
        test_file: Name of the test file.
        subfolders: What the archives unpack to.
        label_key: Under which the pickles have the labels.
        label_bytes: Bytes in front of an image in the binary version; the last is the label.
    """

    name: str
    num_classes: int
    train_files: tuple[str, ...]
    test_file: str
    subfolders: tuple[str, str]
    label_key: bytes
    label_bytes: int


CIFAR10 = CifarForm(
    name="CIFAR-10",
    num_classes=10,
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test_file="test_batch",
    subfolders=("cifar-10-batches-py", "cifar-10-batches-bin"),
    label_key=b"labels",
    label_bytes=1,
)
CIFAR100 = CifarForm(
    name="CIFAR-100",
    num_classes=100,
    train_files=("train",),
    test_file="test",
    subfolders=("cifar-100-python", "cifar-100-binary"),
    label_key=b"fine_labels",
    label_bytes=2,  # the superclass, then the class
)


def load_cifar(form: CifarForm, folder: Path) -> ImageData:
    """The data set from ``folder``, or from the folder in it that the published archive unpacks to.

    Raises:
        DataError: If a file is missing, or is not what it should be.
    """
    found = next((f for f in (folder, *(folder / name for name in form.subfolders)) if _has(form, f)), folder)
    train = _concatenate([_load(form, found, name) for name in form.train_files])
    return ImageData(train, _load(form, found, form.test_file), form.num_classes)


def _has(form: CifarForm, folder: Path) -> bool:
    return any((folder / (form.test_file + ending)).is_file() for ending in ("", ".bin"))


def _load(form: CifarForm, folder: Path, name: str) -> Images:
    if (folder / name).is_file():
        return _read_pickle(form, folder / name)
    if (folder / f"{name}.bin").is_file():
        return _read_binary(form, folder / f"{name}.bin")
    raise DataError(
        f"there is no {name} (python version) or {name}.bin (binary version) of {form.name} in {folder}: "
        "say with --data_dir where its unpacked archive is"
    )


def _read_binary(form: CifarForm, path: Path) -> Images:
    values = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    record = form.label_bytes + _PIXELS
    if not len(values) or len(values) % record:
        raise DataError(
            f"{path} has {len(values)} bytes: expected a multiple of {record}, which an image of "
            f"{form.name} takes"
        )
    records = values.reshape(-1, record)
    labels_n = records[:, form.label_bytes - 1].long()
    return Images(records[:, form.label_bytes :].reshape(-1, *_SHAPE).clone(), labels_n)


def _read_pickle(form: CifarForm, path: Path) -> Images:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except _PICKLE_ERRORS as error:
        raise DataError(
            f"{path} is no file of the python version of {form.name} ({error}): get it anew"
        ) from error
    pixels, labels = (
        content.get(key) if isinstance(content, dict) else None for key in (b"data", form.label_key)
    )
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise DataError(
            f'"{form.label_key.decode()}" in {path} is no list of class numbers: expected a file of '
            f"{form.name}"
        )
    return Images(_as_pixels(path, pixels), torch.tensor(labels, dtype=torch.int64))


def _as_pixels(path: Path, array: Any) -> Tensor:
    if getattr(array, "dtype", None) != np.uint8 or array.ndim != 2 or array.shape[1] != _PIXELS:
        shape = list(getattr(array, "shape", []))
        raise DataError(f'"data" in {path} has shape {shape}: expected uint8 [images, {_PIXELS}]')
    return torch.tensor(array).reshape(-1, *_SHAPE)


def _concatenate(parts: Sequence[Images]) -> Images:
    return Images(
        torch.cat([part.pixels_nchw for part in parts]), torch.cat([part.labels_n for part in parts])
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Reads what arrays consist of, and refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")
        return super().find_class(module, name)
