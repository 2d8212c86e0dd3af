"""Micro-batches of images: endless ones to train on, and those of one pass over the test images.

Shape suffixes: b micro-batch, c channel, h row, w column.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.images.augment import CropsAndFlips
from ds_interlock.images.data import Images, Normalisation
from ds_interlock.sampling import ResumableIterator, epoch_order

MicroBatch = tuple[Tensor, Tensor]
"""(images_bchw, labels_b): float32 and int64."""


class ImageIterator(ResumableIterator[MicroBatch]):
    """Endless shuffled micro-batches for one data-parallel replica, fixed by the seed.

    In every epoch all replicas go through the same permutation of the images, each taking its own share;
    the few that fill no micro-batch for everyone are left out, others in each epoch. A position is one
    number, and a resumed run sees the micro-batches that an undisturbed one would have.

    Args:
        images: What to take from; at least ``micro_batch_size * num_replicas``.
        normalisation: Applied last.
        micro_batch_size: Images in a micro-batch.
        replica: Number of this data-parallel replica.
        num_replicas: How many there are.
        seed: Decides order, crops and flips.
        augment: Whether to crop and flip at random.

    Raises:
        DataError: If there are too few images for one micro-batch of every replica.
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
        if len(images) < micro_batch_size * num_replicas:
            raise DataError(
                f"there are {len(images)} training images, fewer than a micro-batch of {micro_batch_size} "
                f"for each of {num_replicas} replicas takes: use more images, or a smaller "
                "train_micro_batch_size_per_gpu in the DeepSpeed config"
            )
        self.images = images
        self.normalisation = normalisation
        self.micro_batch_size = micro_batch_size
        self.replica = replica
        self.num_replicas = num_replicas
        self.seed = seed
        self.augment = augment
        self._epoch = -1
        self._pixel_sum = int(images.pixels_nchw.sum(dtype=torch.int64))

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that this replica gets in an epoch."""
        return len(self.images) // (self.micro_batch_size * self.num_replicas)

    def __next__(self) -> MicroBatch:
        epoch, number = divmod(self.position, self.num_micro_batches)
        if epoch != self._epoch:
            self._begin(epoch)
        start = (number * self.num_replicas + self.replica) * self.micro_batch_size
        chosen_b = self._order[start : start + self.micro_batch_size]
        at = chosen_b.to(self.images.labels_n.device)
        pixels_bchw = self.images.pixels_nchw[at]
        if self.augment:
            pixels_bchw = self._draws.apply(pixels_bchw, chosen_b)
        self.position += 1
        return self.normalisation(pixels_bchw), self.images.labels_n[at]

    def fingerprint(self) -> dict[str, int | str]:
        return {
            "num_images": len(self.images),
            "pixel_sum": self._pixel_sum,  # tells data sets of one size apart
            "micro_batch_size": self.micro_batch_size,
            "num_replicas": self.num_replicas,
            "seed": self.seed,
            "augment": int(self.augment),
        }

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = epoch_order(len(self.images), self.seed, epoch)
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
    """One pass over ``images``: each in one micro-batch of one replica, as it is.

    All micro-batches are full, and all replicas get as many. What is missing for that in the end is filled
    with other images under the label ``IGNORED_LABEL``.
    """
    num_batches = num_evaluation_batches(len(images), micro_batch_size, num_replicas)
    for number in range(num_batches):
        start = (number * num_replicas + replica) * micro_batch_size
        numbers_b = torch.arange(start, start + micro_batch_size, device=images.labels_n.device)
        at = numbers_b % len(images)
        labels_b = images.labels_n[at].where(numbers_b < len(images), IGNORED_LABEL)
        yield normalisation(images.pixels_nchw[at]), labels_b
