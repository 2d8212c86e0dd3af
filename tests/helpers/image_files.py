"""Small data sets in the forms in which they are published."""

import gzip
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_interlock.images.data import Images, Score


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


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """The score of a model in one process, in evaluation mode."""
    model.eval()
    return sum((Score.of(model(images), labels) for images, labels in batches), Score())
