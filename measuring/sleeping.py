"""Layers that sleep instead of computing, so that a pipeline's own behaviour can be timed on any machine.

K processes on two cores cannot all compute at once, but they can all sleep at once: the time of a batch is
then that of the schedule and the engine.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_interlock.schedule.plan import LossHead
from measuring.engines import Workload

LAYERS_PER_STAGE = 4
HEAD_SHARE = 0.3
"""Of equal stages: what an auxiliary head takes, forward and backward, relative to a stage's forward."""

_WIDTH = 16

_AWAKE_SECONDS = 0.00006
"""The end of a sleep that is waited for awake: about what waking up takes with exact timers."""

_MOST_OWED_SECONDS = 0.0005
"""A sleep that ends later than this was kept from a core; the next one does not make up for all of it."""

_PR_SET_TIMERSLACK = 29

_owed_seconds = 0.0


def sleep(seconds: float) -> None:
    """Sleeps ``seconds``; if it takes longer, the next sleep of this process is shorter by as much.

    Waiting awake until the end of every sleep would cost the stages that share a core theirs.
    """
    global _owed_seconds
    seconds -= _owed_seconds
    end = time.perf_counter() + seconds
    if seconds > _AWAKE_SECONDS:
        time.sleep(seconds - _AWAKE_SECONDS)
    while (now := time.perf_counter()) < end:
        pass
    _owed_seconds = min(now - end, _MOST_OWED_SECONDS)


def use_exact_timers() -> None:
    """Asks Linux not to let this thread's sleeps, and those of threads it starts, end 50 us late."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


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
    """Sleeps in the forward, for the input gradient, and for the weight gradient."""

    def __init__(
        self, width: int, seconds: float, input_gradient_seconds: float, weight_gradient_seconds: float
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.seconds = seconds
        self.input_gradient_seconds = input_gradient_seconds
        self.weight_gradient_seconds = weight_gradient_seconds

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        start = time.perf_counter()
        # The weight has a path of its own, so that autograd walks it only where a weight gradient is
        # asked for, as inside torch's own operators; the input's path is part of every backward pass.
        # The input counts as depending on a weight: a backward pass for the weights then sleeps for every
        # input gradient, that of a stage's first layer included, even where no stage needs it.
        x = x + 0 * self.weight
        weight: Tensor = _Sleep.apply(self.weight, 0.0, self.weight_gradient_seconds)  # type: ignore[no-untyped-call]
        # Torch's own time is part of the layer's.
        left = self.seconds - (time.perf_counter() - start)
        slept: Tensor = _Sleep.apply(x, left, self.input_gradient_seconds)  # type: ignore[no-untyped-call]
        return slept + weight


class SleepingHead(nn.Module):
    """A head whose forward and backward together take ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = seconds

    def loss(self, hidden: Tensor, labels: Tensor, loss_fn: Any) -> Tensor:
        """Of ``hidden`` [..., width]; is part of the head's seconds, whatever ``loss_fn`` takes."""
        sleep(self.seconds)
        return sleeping_loss(hidden + self.weight, labels)


def sleeping_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss that costs next to nothing."""
    return (outputs - labels).square().mean()


def sleeping_workload(
    layers: Sequence[Sequence[float]],
    head_seconds: Callable[[LossHead], float],
    loss_seconds: float = 0.0,
    stage_bounds: Sequence[int] | None = None,
) -> Workload:
    """Layers that sleep in the forward, for the input and for the weight gradient; asks for exact timers."""
    use_exact_timers()

    def final_loss(outputs: Tensor, labels: Tensor) -> Tensor:
        if loss_seconds:
            sleep(loss_seconds)
        return sleeping_loss(outputs, labels)

    return Workload(
        layers=[LayerSpec(SleepingLayer, _WIDTH, *passes) for passes in layers],
        layer_seconds=[sum(passes) for passes in layers],
        loss_fn=final_loss,
        micro_batch=(torch.ones(1, _WIDTH), torch.zeros(1, _WIDTH)),
        head=lambda position: SleepingHead(head_seconds(position)),
        stage_bounds=stage_bounds,
    )


def equal_bounds(num_stages: int) -> list[int]:
    """Where the stages of ``equal_stages`` are cut."""
    return [LAYERS_PER_STAGE * stage for stage in range(num_stages + 1)]


def equal_stages(seconds: float, weight_gradients: Sequence[float], input_gradient: float = 1.0) -> Workload:
    """Stages that sleep ``seconds`` in the forward; their gradients take multiples of that."""
    share = seconds / LAYERS_PER_STAGE
    layers = [
        (share, input_gradient * share, weight_gradient * share)
        for weight_gradient in weight_gradients
        for _ in range(LAYERS_PER_STAGE)
    ]
    return sleeping_workload(layers, lambda position: HEAD_SHARE * seconds)
