"""A data set by name.

fashion-mnist       IDX files, by default those of the Debian package dataset-fashion-mnist
cifar10, cifar100   ``datasets.load_dataset("uoft-cs/cifar10")``, or the parquet files in --data_dir
any other name      ``datasets.load_dataset``, with an image and a label in each row

torchvision's readers are not used: its wheels do not import beside a torch without CUDA.

Source: LeCun, Cortes, Burges: The MNIST database of handwritten digits, "File formats".
"""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.images.data import ImageData, Images

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_UNSIGNED_BYTES = 8
_COLUMNS = (("image", "img"), ("label", "fine_label"))


def load_images(
    dataset: str = "fashion-mnist", folder: Path | None = None, config: str | None = None
) -> ImageData:
    """The training and test images of a data set (see the top of the file); DataError if it is faulty.

    ``folder`` has the files of fashion-mnist, cifar10 or cifar100; ``config`` names the configuration of a
    data set that ``datasets`` loads.
    """
    if dataset == "fashion-mnist":
        return load_fashion_mnist(folder)
    if dataset in ("cifar10", "cifar100"):
        dataset = str(folder) if folder else f"uoft-cs/{dataset}"
    return _load_hub(dataset, config)


def load_fashion_mnist(folder: Path | None = None) -> ImageData:
    """Fashion-MNIST, or any data set of ten classes in files of the same names (MNIST).

    ``folder`` has ``train-images-idx3-ubyte`` and the others, with or without ``.gz``; by default it is the
    Debian package's. DataError if a file is missing or damaged.
    """
    folder = folder or DEBIAN_FOLDER
    train, test = (
        Images(
            _read_idx(folder, f"{split}-images-idx3-ubyte", num_dims=3).unsqueeze(1),
            _read_idx(folder, f"{split}-labels-idx1-ubyte", num_dims=1).long(),
        )
        for split in ("train", "t10k")
    )
    return ImageData(train, test, num_classes=10)


def _read_idx(folder: Path, name: str, num_dims: int) -> Tensor:
    """uint8, of the sizes in the header: big-endian, after a magic number with type and dimensions."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(
            f"there is no {name} or {name}.gz in {folder}: install Fashion-MNIST with apt-get install "
            "dataset-fashion-mnist, or give the folder of its IDX files with --data_dir"
        )
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        magic, *sizes = struct.unpack_from(f">{1 + num_dims}I", content)
        if magic != (_UNSIGNED_BYTES << 8) + num_dims:
            raise ValueError(f"its magic number is {magic:#010x}")
        values = np.frombuffer(content, np.uint8, offset=4 * (1 + num_dims)).reshape(sizes)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise DataError(
            f"{path} is no IDX file of unsigned bytes in {num_dims} dimensions ({error}): download it again"
        ) from error
    return torch.from_numpy(values.copy())


def _load_hub(name: str, config: str | None) -> ImageData:
    # Only here: it imports datasets, which takes seconds.
    from ds_interlock.hf.data.loading import load_splits

    splits = load_splits(name, config)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if test is None:
        raise DataError(f'data set {name!r} has the splits {sorted(splits)}: expected one named "test"')
    train_images, test_images = (_from_rows(splits[split], name) for split in ("train", test))
    num_classes = 1 + int(torch.cat([train_images.labels_n, test_images.labels_n]).max())
    return ImageData(train_images, test_images, num_classes)


def _from_rows(split: Any, name: str) -> Images:
    image, label = (next((n for n in names if n in split.column_names), None) for names in _COLUMNS)
    if image is None or label is None:
        expected = ", and one of ".join(", ".join(names) for names in _COLUMNS)
        raise DataError(f"data set {name!r} has the columns {split.column_names}: expected one of {expected}")
    labels = list(split[label])
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"data set {name!r} has labels that are not class numbers, as {labels[0]!r}")
    pixels = [_as_pixels(picture, name) for picture in split[image]]
    sizes = sorted({tuple(each.shape) for each in pixels})
    if len(sizes) != 1:
        raise DataError(f"data set {name!r} has images of {len(sizes)} sizes, as {sizes[:2]}: expected one")
    return Images(torch.stack(pixels), torch.tensor(labels, dtype=torch.int64))


def _as_pixels(picture: Any, name: str) -> Tensor:
    """A PIL image as uint8 ``[c, h, w]``: grey ones with one channel, all others with three."""
    if not hasattr(picture, "convert"):
        raise DataError(f"data set {name!r} has a {type(picture).__name__} for a picture (datasets.Image)")
    array = np.array(picture if picture.mode == "L" else picture.convert("RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
