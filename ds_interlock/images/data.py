"""Labelled images in memory, how they are normalised, and how well they are classified.

Shape suffixes: n image, b micro-batch, c channel, h row, w column, v class.
"""

import operator
from dataclasses import astuple, dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL

_NUM_VALUES = 256  # of a pixel


@dataclass(frozen=True)
class Images:
    """Labelled images; DataError if types or shapes are others."""

    pixels_nchw: Tensor  # uint8
    labels_n: Tensor  # int64, the class of each image

    def __post_init__(self) -> None:
        pixels, labels = self.pixels_nchw, self.labels_n
        is_right = pixels.dtype is torch.uint8 and pixels.dim() == 4 and labels.dtype is torch.int64
        if not is_right or labels.shape != pixels.shape[:1]:
            raise DataError(
                f"images are {pixels.dtype} {list(pixels.shape)} with labels {labels.dtype} "
                f"{list(labels.shape)}: expected uint8 [images, channels, rows, columns] and int64 [images]"
            )

    def __len__(self) -> int:
        return len(self.labels_n)

    def first(self, num_images: int) -> Self:
        """All if there are fewer, or ``num_images`` is 0."""
        return type(self)(self.pixels_nchw[: num_images or None], self.labels_n[: num_images or None])

    def after(self, num_images: int) -> Self:
        """All but the first ``num_images``."""
        return type(self)(self.pixels_nchw[num_images:], self.labels_n[num_images:])

    def to(self, device: torch.device | str) -> Self:
        """The images on ``device``, where micro-batches are then made."""
        return type(self)(self.pixels_nchw.to(device), self.labels_n.to(device))


@dataclass(frozen=True)
class ImageData:
    """Training images, test images of the same size, and the number of classes; labels count from 0.

    DataError if a part has no images, sizes differ, or a label is no class.
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
            raise DataError(f"training images are {train} and test images {test}: expected one size")

    @property
    def in_channels(self) -> int:
        return self.train.pixels_nchw.shape[1]


class Normalisation(NamedTuple):
    """Mean 0 and standard deviation 1 for every channel (float32, of pixels 0 to 255)."""

    mean_c: Tensor
    std_c: Tensor

    @classmethod
    def of(cls, images: Images) -> Self:
        """From the exact mean and standard deviation of ``images``; take the training images."""
        values = torch.arange(_NUM_VALUES, dtype=torch.float64)
        means, stds = [], []
        for channel in images.pixels_nchw.unbind(1):
            # A histogram is exact, and the pixels in float64 would fill the memory.
            shares = torch.bincount(channel.flatten(), minlength=_NUM_VALUES).cpu().double() / channel.numel()
            means.append((shares * values).sum())
            stds.append((shares * (values - means[-1]).square()).sum().sqrt())
        # A channel of one value keeps it: there is nothing to scale.
        return cls(torch.stack(means).float(), torch.stack(stds).clamp(min=1).float())

    def __call__(self, pixels_bchw: Tensor) -> Tensor:
        """Pixels (uint8) as float32, normalised."""
        mean, std = (t.to(pixels_bchw.device).reshape(-1, 1, 1) for t in self)
        return (pixels_bchw.float() - mean) / std


@dataclass(frozen=True)
class Score:
    """Images whose label is not ``IGNORED_LABEL``, wrong ones among them, and the sum of losses in nats."""

    num_images: int = 0
    num_errors: int = 0
    loss_sum: float = 0.0

    @classmethod
    def of(cls, logits_bv: Tensor, labels_b: Tensor) -> Self:
        """The score of the outputs for some images."""
        counted_b = labels_b != IGNORED_LABEL
        logits_bv, labels_b = logits_bv[counted_b].double(), labels_b[counted_b]
        num_errors = int((logits_bv.argmax(-1) != labels_b).sum())
        return cls(len(labels_b), num_errors, F.cross_entropy(logits_bv, labels_b, reduction="sum").item())

    def __add__(self, other: "Score") -> "Score":
        return Score(*map(operator.add, astuple(self), astuple(other)))

    @property
    def error(self) -> float:
        """Share of the images that are classified wrongly."""
        return self.num_errors / self.num_images

    @property
    def loss(self) -> float:
        """Mean cross-entropy of an image, in nats."""
        return self.loss_sum / self.num_images
