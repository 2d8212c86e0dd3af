"""Random crops and flips: what every image looks like in an epoch.

    padded by 4 pixels of zeros       a window of the image's size          every second image mirrored
    ┌───────────────┐
    │  ┌─────────┐  │                 0 to 8 rows down, 0 to 8 columns
    │  │         │  │      ──►        to the right                      ──►      left ◄─► right
    │  └─────────┘  │
    └───────────────┘

Shape suffixes: n image, b micro-batch, c channel, h row, w column.

Source: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2016, section 4.2.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4


@dataclass(frozen=True)
class CropsAndFlips:
    """The draws of one epoch, one for each image of the data set.

    They depend on seed, epoch and the image's number alone, so that an image looks the same whatever
    micro-batch and replica it falls to, and a resumed run sees what an undisturbed one would have.

    Attributes:
        top_n: int64, rows that the window is moved down, 0 to 2 * ``PADDING``.
        left_n: int64, columns that it is moved to the right, likewise.
        flip_n: bool, whether left and right are exchanged.
    """

    top_n: Tensor
    left_n: Tensor
    flip_n: Tensor

    @classmethod
    def draw(cls, num_images: int, seed: int, epoch: int) -> Self:
        """What an epoch does to ``num_images`` images."""
        # Negative: the order of the images is drawn from the same number, above 0.
        generator = torch.Generator().manual_seed(-1 - (seed * 2**20 + epoch))
        top_n, left_n = torch.randint(2 * PADDING + 1, (2, num_images), generator=generator)
        return cls(top_n, left_n, torch.rand(num_images, generator=generator) < 0.5)

    def apply(self, pixels_bchw: Tensor, numbers_b: Tensor) -> Tensor:
        """The images as they look in this epoch.

        Args:
            pixels_bchw: Some images, as they are.
            numbers_b: int64, their numbers in the data set.

        Returns:
            Images of the same type, shape and device.
        """
        num_images, num_channels, num_rows, num_columns = pixels_bchw.shape
        rows_bh = self.top_n[numbers_b, None] + torch.arange(num_rows)
        columns_bw = self.left_n[numbers_b, None] + torch.arange(num_columns)
        columns_bw = torch.where(self.flip_n[numbers_b, None], columns_bw.flip(1), columns_bw)
        padded_bchw = F.pad(pixels_bchw, (PADDING,) * 4)
        device = pixels_bchw.device
        return padded_bchw[
            torch.arange(num_images, device=device)[:, None, None, None],
            torch.arange(num_channels, device=device)[:, None, None],
            rows_bh.to(device)[:, None, :, None],
            columns_bw.to(device)[:, None, None, :],
        ]
