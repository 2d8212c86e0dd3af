"""A network whose layers, heads and loss change what they receive in place, and its twin that does not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8
NUM_LAYERS = 12
STAGE_BOUNDS = [0, 3, 6, 9, 12]
"""Every stage but the first begins with a layer that works in place, and so do parts after heads within."""


class Scale(nn.Module):
    """Doubles what it receives, and sets the first column to 0."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x_bd: Tensor) -> Tensor:
        if not self.in_place:
            return (2 * x_bd) * (torch.arange(x_bd.shape[1]) > 0)
        x_bd.mul_(2)
        x_bd[:, 0] = 0
        return x_bd


@dataclass(frozen=True)
class Network:
    """Layers of ``WIDTH`` features, with batch norm; heads; a loss."""

    in_place: bool

    def layer(self, number: int) -> nn.Module:
        """The layer with this number, always with the same weights."""
        kinds: list[Callable[[], nn.Module]] = [
            lambda: nn.Linear(WIDTH, WIDTH),
            lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
            lambda: Scale(self.in_place),
            lambda: nn.ReLU(inplace=self.in_place),
        ]
        order = [0, 1, 0, 2, 1, 3, 3, 1, 2, 2, 1, 0]
        torch.manual_seed(number)
        return kinds[order[number]]()

    def layers(self) -> list[nn.Module]:
        """All layers."""
        return [self.layer(number) for number in range(NUM_LAYERS)]

    def head(self, position: Any) -> nn.Module:
        """An auxiliary head."""
        torch.manual_seed(100 + position.after_layer)
        return nn.Sequential(Scale(self.in_place), nn.ReLU(inplace=self.in_place), nn.Linear(WIDTH, WIDTH))

    def loss(self, outputs_bd: Tensor, labels_b: Tensor) -> Tensor:
        """Of labels from 1 to ``WIDTH``; the label 1 counts for nothing."""
        if self.in_place:
            labels_b.sub_(1)
            labels_b[labels_b == 0] = -100
            outputs_bd.div_(2)
        else:
            labels_b = labels_b - 1
            labels_b = torch.where(labels_b == 0, -100, labels_b)
            outputs_bd = outputs_bd / 2
        return F.cross_entropy(outputs_bd, labels_b)


def micro_batches(num: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(rows, WIDTH, generator=generator),
            torch.randint(1, WIDTH + 1, (rows,), generator=generator),
        )
        for _ in range(num)
    ]
