"""Small data sets in the forms in which they are published."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ds_interlock.images.cifar import CifarForm
from ds_interlock.images.data import Images


def random_images(num_images: int, shape: tuple[int, int, int], num_classes: int, seed: int = 0) -> Images:
    """Noise, labelled 0, 1, 2 and so on."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (num_images, *shape), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(num_images) % num_classes)


def striped_images(num_images: int, size: int = 8, seed: int = 0) -> Images:
    """Grey images under noise: class 1 has bright columns, 2 bright rows, 3 both, 0 none.

    Flips and crops do not hide which.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % 4
    pixels = torch.randint(60, (num_images, 1, size, size), generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[0, :, ::2] += 60 * (label & 1)
        image[0, ::2, :] += 120 * (label >> 1 & 1)
    return Images(pixels.to(torch.uint8), labels)


def idx(values: Tensor) -> bytes:
    """An IDX file of unsigned bytes."""
    sizes = struct.pack(f">{values.dim()}I", *values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + values.to(torch.uint8).numpy().tobytes()


def write_idx(folder: Path, train: Images, test: Images, *, zipped: bool = False) -> None:
    """The four files of MNIST and its relatives."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, images in (("train", train), ("t10k", test)):
        for name, values in (
            (f"{split}-images-idx3-ubyte", images.pixels_nchw[:, 0]),
            (f"{split}-labels-idx1-ubyte", images.labels_n),
        ):
            content = idx(values)
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content) if zipped else content)


def write_cifar(folder: Path, form: CifarForm, train: Images, test: Images, *, binary: bool) -> None:
    """The files of CIFAR-10 or CIFAR-100; the training images are spread over as many as there are."""
    folder.mkdir(parents=True, exist_ok=True)
    num_files = len(form.train_files)
    parts = zip(train.pixels_nchw.chunk(num_files), train.labels_n.chunk(num_files), strict=True)
    files = {name: Images(*part) for name, part in zip(form.train_files, parts, strict=True)}
    for name, images in (files | {form.test_file: test}).items():
        if binary:
            (folder / f"{name}.bin").write_bytes(_cifar_records(form, images))
        else:
            pixels = images.pixels_nchw.flatten(1).numpy()
            content = {b"data": pixels, form.label_key: images.labels_n.tolist(), b"batch_label": b"1 of 5"}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def _cifar_records(form: CifarForm, images: Images) -> bytes:
    labels = np.full((len(images), form.label_bytes), 7, dtype=np.uint8)  # 7: whatever superclass
    labels[:, -1] = images.labels_n.numpy()
    return np.concatenate([labels, images.pixels_nchw.flatten(1).numpy()], axis=1).tobytes()
