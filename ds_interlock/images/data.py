"""Labelled images in memory, and how they are normalised.

Shape suffixes: n image, b micro-batch, c channel, h row, w column.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ds_interlock.errors import DataError

_NUM_VALUES = 256  # of a pixel


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels_nchw: uint8.
        labels_n: int64, the class of each image.

    Raises:
        DataError: If types or shapes are others.
    """

    pixels_nchw: Tensor
    labels_n: Tensor

    def __post_init__(self) -> None:
        pixels, labels = self.pixels_nchw, self.labels_n
        if pixels.dtype is not torch.uint8 or pixels.dim() != 4:
            raise DataError(
                f"images are {pixels.dtype} {list(pixels.shape)}: expected uint8 [images, channels, rows, "
                "columns]"
            )
        if labels.dtype is not torch.int64 or labels.shape != pixels.shape[:1]:
            raise DataError(
                f"the labels of {len(pixels)} images are {labels.dtype} {list(labels.shape)}: expected int64 "
                f"[{len(pixels)}]"
            )

    def __len__(self) -> int:
        return len(self.labels_n)

    def first(self, num_images: int) -> Self:
        """The first ``num_images`` of them, or all if there are fewer."""
        return type(self)(self.pixels_nchw[:num_images], self.labels_n[:num_images])

    def to(self, device: torch.device | str) -> Self:
        """The images on ``device``: micro-batches are then made there."""
        return type(self)(self.pixels_nchw.to(device), self.labels_n.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set.

    Attributes:
        train: The training images.
        test: The test images, of the same size.
        num_classes: Labels are 0 .. num_classes - 1.

    Raises:
        DataError: If there are no images, sizes differ, or a label is no class.
    """

    train: Images
    test: Images
    num_classes: int

    def __post_init__(self) -> None:
        for name, images in (("training", self.train), ("test", self.test)):
            if not len(images):
                raise DataError(f"the data set has no {name} images: expected at least one")
            lowest, highest = (int(label) for label in images.labels_n.aminmax())
            if lowest < 0 or highest >= self.num_classes:
                raise DataError(
                    f"the labels of the {name} images go from {lowest} to {highest}: expected 0 to "
                    f"{self.num_classes - 1}"
                )
        train, test = (list(images.pixels_nchw.shape[1:]) for images in (self.train, self.test))
        if train != test:
            raise DataError(
                f"training images are {train} and test images {test} (channels, rows, columns): expected "
                "one size"
            )

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.train.pixels_nchw.shape[1]


@dataclass(frozen=True)
class Normalisation:
    """Gives every channel mean 0 and standard deviation 1 over the images it was made from.

    Attributes:
        mean_c: float32, of the pixels, 0 to 255.
        std_c: float32, likewise.
    """

    mean_c: Tensor
    std_c: Tensor

    @classmethod
    def of(cls, images: Images) -> Self:
        """From the exact mean and standard deviation of ``images``; take the training images."""
        values = torch.arange(_NUM_VALUES, dtype=torch.float64)
        means, stds = [], []
        for channel in images.pixels_nchw.unbind(1):
            # A histogram holds all there is to know, where the pixels in float64 would fill the memory.
            shares = torch.bincount(channel.flatten(), minlength=_NUM_VALUES).cpu().double() / channel.numel()
            mean = (shares * values).sum()
            means.append(mean)
            stds.append((shares * (values - mean).square()).sum().sqrt())
        # A channel of one value keeps it: there is nothing to scale.
        return cls(torch.stack(means).float(), torch.stack(stds).clamp(min=1).float())

    def __call__(self, pixels_bchw: Tensor) -> Tensor:
        """Pixels (uint8) as float32, normalised."""
        mean, std = (t.to(pixels_bchw.device).reshape(-1, 1, 1) for t in (self.mean_c, self.std_c))
        return (pixels_bchw.float() - mean) / std
