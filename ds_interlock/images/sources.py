"""A data set by name: from files on this machine, or by ``datasets``.

fashion-mnist            IDX files (idx.py), by default those of the Debian package
cifar10, cifar100        the published files in --data_dir (cifar.py)
any other name           ``datasets.load_dataset``, with an image and a label in each row
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.images.cifar import CIFAR10, CIFAR100, load_cifar
from ds_interlock.images.data import ImageData, Images
from ds_interlock.images.idx import load_fashion_mnist

_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")


def load_images(
    dataset: str = "fashion-mnist", folder: Path | None = None, config: str | None = None
) -> ImageData:
    """The training and test images of a data set.

    Args:
        dataset: See the top of the file.
        folder: Where its files are; for fashion-mnist, cifar10 and cifar100.
        config: Name of the configuration of a data set that ``datasets`` loads.

    Raises:
        DataError: If there is no such data set, or something is wrong with it.
    """
    if dataset == "fashion-mnist":
        return load_fashion_mnist(folder)
    if dataset not in _CIFAR:
        return _load_hub(dataset, config)
    if folder is None:
        raise DataError(
            f"--dataset {dataset} needs --data_dir, the folder of its unpacked archive; or give the name of "
            f"a data set on a hub, as --dataset uoft-cs/{dataset}"
        )
    return load_cifar(_CIFAR[dataset], folder)


def _load_hub(name: str, config: str | None) -> ImageData:
    # Only here: it imports transformers, which takes seconds.
    from ds_interlock.hf.data.text import load_splits

    splits = load_splits(name, config)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if test is None:
        raise DataError(f'data set {name!r} has the splits {sorted(splits)}: expected one named "test"')
    train_images, test_images = (_images(splits[split], name) for split in ("train", test))
    num_classes = 1 + int(torch.cat([train_images.labels_n, test_images.labels_n]).max())
    return ImageData(train_images, test_images, num_classes)


def _images(split: Any, name: str) -> Images:
    columns = split.column_names
    image = next((column for column in _IMAGE_COLUMNS if column in columns), None)
    label = next((column for column in _LABEL_COLUMNS if column in columns), None)
    if image is None or label is None:
        raise DataError(
            f"data set {name!r} has the columns {columns}: expected one of {', '.join(_IMAGE_COLUMNS)}, and "
            f"one of {', '.join(_LABEL_COLUMNS)}"
        )
    labels = list(split[label])
    if not all(isinstance(each, int) for each in labels):
        raise DataError(f"the column {label!r} of data set {name!r} holds other labels than class numbers")
    pixels = [_as_pixels(picture, f"the column {image!r} of data set {name!r}") for picture in split[image]]
    sizes = sorted({tuple(each.shape) for each in pixels})
    if len(sizes) != 1:
        raise DataError(
            f"data set {name!r} has images of {len(sizes)} sizes (channels, rows, columns), as "
            f"{sizes[:2]}: expected one size"
        )
    return Images(torch.stack(pixels), torch.tensor(labels, dtype=torch.int64))


def _as_pixels(picture: Any, where: str) -> Tensor:
    """A PIL image as uint8 ``[c, h, w]``: grey ones with one channel, all others with three."""
    if not hasattr(picture, "convert"):
        raise DataError(f"{where} holds a {type(picture).__name__}: expected pictures (datasets.Image)")
    array = np.array(picture if picture.mode == "L" else picture.convert("RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)
