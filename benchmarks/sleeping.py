"""Layers that sleep instead of computing, so that a pipeline's own behaviour can be timed on any machine.

K processes on two cores cannot all compute at once, but they can all sleep at once: what a batch then
takes is what the schedule and the engine make of it.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

_OVERSHOOT_SECONDS = 0.0003
"""How much longer than asked a sleep takes on an ordinary kernel; the last bit is waited for awake."""


def sleep(seconds: float) -> None:
    """Sleeps ``seconds``, to some microseconds if a core is free at the end."""
    end = time.perf_counter() + seconds
    if seconds > _OVERSHOOT_SECONDS:
        time.sleep(seconds - _OVERSHOOT_SECONDS)
    while time.perf_counter() < end:
        pass


class _Sleep(torch.autograd.Function):
    """Passes a tensor through, sleeping in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_seconds: float, backward_seconds: float) -> Tensor:
        ctx.seconds = backward_seconds
        sleep(forward_seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        sleep(ctx.seconds)
        return gradient, None, None


class SleepingLayer(nn.Module):
    """Sleeps ``seconds`` in the forward, for the input gradient, and for the weight gradient.

    Args:
        width: Size of the last dimension of its input.
        seconds: Length of one sleep.
    """

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        start = time.perf_counter()
        # The weight has a path of its own, so that autograd walks it only where a weight gradient is
        # asked for, as inside torch's own operators; the input's path is part of every backward pass.
        if x.is_leaf:
            # The input of a stage counts as depending on a weight: a backward pass for the weights then
            # sleeps for every input gradient, this one included, even where nobody wants it.
            x = x + 0 * self.weight
        weight: Tensor = _Sleep.apply(self.weight, 0.0, self.seconds)  # type: ignore[no-untyped-call]
        # What torch itself took is part of the layer's time.
        left = self.seconds - (time.perf_counter() - start)
        slept: Tensor = _Sleep.apply(x, left, self.seconds)  # type: ignore[no-untyped-call]
        return slept + weight


class SleepingHead(nn.Module):
    """A head whose forward and backward together take ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        sleep(self.seconds)
        return x + self.weight


def sleeping_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss that costs nothing to speak of."""
    return (outputs - labels).square().mean()
