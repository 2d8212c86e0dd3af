"""Micro-batches of images: endless ones to train on, and those of one pass over the test images.

Shape suffixes: n image, b micro-batch, c channel, h row, w column.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.images.data import Images, Normalisation
from ds_interlock.sampling import EpochIterator

PADDING = 4
"""Pixels of zeros around an image before it is cropped to its size."""

MicroBatch = tuple[Tensor, Tensor]
"""(images_bchw, labels_b): float32 and int64."""


@dataclass(frozen=True)
class CropsAndFlips:
    """How every image looks in one epoch: a window of the padded image, every second one mirrored.

    The draws depend on seed, epoch and image index alone: an image looks the same in every micro-batch and
    replica, also after a resume.

    Source: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2016, section 4.2.
    """

    top_n: Tensor  # int64, rows that the window is moved by, 0 to 2 * PADDING
    left_n: Tensor  # the same for columns
    flip_n: Tensor  # bool

    @classmethod
    def draw(cls, num_images: int, seed: int, epoch: int) -> Self:
        """What an epoch does to ``num_images`` images."""
        # Negative: the order of the images is drawn from the same number, above 0.
        generator = torch.Generator().manual_seed(-1 - (seed * 2**20 + epoch))
        top_n, left_n = torch.randint(2 * PADDING + 1, (2, num_images), generator=generator)
        return cls(top_n, left_n, torch.rand(num_images, generator=generator) < 0.5)

    def apply(self, pixels_bchw: Tensor, indices_b: Tensor) -> Tensor:
        """The images at ``indices_b`` (int64) of the data set as they look in this epoch."""
        num_images, num_channels, num_rows, num_columns = pixels_bchw.shape
        rows_bh = self.top_n[indices_b, None] + torch.arange(num_rows)
        columns_bw = self.left_n[indices_b, None] + torch.arange(num_columns)
        columns_bw = columns_bw.flip(1).where(self.flip_n[indices_b, None], columns_bw)
        device = pixels_bchw.device
        return F.pad(pixels_bchw, (PADDING,) * 4)[
            torch.arange(num_images, device=device)[:, None, None, None],
            torch.arange(num_channels, device=device)[:, None, None],
            rows_bh.to(device)[:, None, :, None],
            columns_bw.to(device)[:, None, None, :],
        ]


class ImageIterator(EpochIterator[MicroBatch]):
    """Endless shuffled micro-batches for one data-parallel replica; order, crops and flips by the seed.

    DataError if there are too few images for one micro-batch of every replica.
    """

    def __init__(
        self,
        images: Images,
        normalisation: Normalisation,
        micro_batch_size: int,
        *,
        replica: int = 0,
        num_replicas: int = 1,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__(len(images), micro_batch_size, replica=replica, num_replicas=num_replicas, seed=seed)
        if not self.num_micro_batches:
            raise DataError(
                f"there are {len(images)} training images, fewer than a micro-batch of {micro_batch_size} "
                f"for each of {num_replicas} replicas takes: lower train_micro_batch_size_per_gpu in the "
                "DeepSpeed config"
            )
        self.images, self.normalisation, self.augment = images, normalisation, augment
        self._pixel_sum = int(images.pixels_nchw.sum(dtype=torch.int64))

    def __next__(self) -> MicroBatch:
        chosen_b = self.next_indices()
        at = chosen_b.to(self.images.labels_n.device)
        pixels_bchw = self.images.pixels_nchw[at]
        if self.augment:
            pixels_bchw = self._draws.apply(pixels_bchw, chosen_b)
        return self.normalisation(pixels_bchw), self.images.labels_n[at]

    def fingerprint(self) -> dict[str, int | str]:
        # The sum of the pixels differs between data sets of one size.
        images = {"num_images": len(self.images), "pixel_sum": self._pixel_sum}
        return {**images, **super().fingerprint(), "augment": int(self.augment)}

    def _begin_epoch(self, epoch: int) -> None:
        super()._begin_epoch(epoch)
        self._draws = CropsAndFlips.draw(len(self.images), self.seed, epoch)


def num_evaluation_batches(num_images: int, micro_batch_size: int, num_replicas: int = 1) -> int:
    """How many micro-batches ``evaluation_batches`` gives to each replica."""
    return -(-num_images // (micro_batch_size * num_replicas))


def evaluation_batches(
    images: Images,
    normalisation: Normalisation,
    micro_batch_size: int,
    *,
    replica: int = 0,
    num_replicas: int = 1,
) -> Iterator[MicroBatch]:
    """One pass over ``images``, each in one micro-batch of one replica, neither cropped nor flipped.

    All replicas get the same number of full micro-batches. The last are filled up with other images under
    the label ``IGNORED_LABEL``.
    """
    for number in range(num_evaluation_batches(len(images), micro_batch_size, num_replicas)):
        start = (number * num_replicas + replica) * micro_batch_size
        indices_b = torch.arange(start, start + micro_batch_size, device=images.labels_n.device)
        at = indices_b % len(images)
        labels_b = images.labels_n[at].where(indices_b < len(images), IGNORED_LABEL)
        yield normalisation(images.pixels_nchw[at]), labels_b
