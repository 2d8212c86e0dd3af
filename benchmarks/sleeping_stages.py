"""Stages that sleep instead of computing, all equally long in the forward."""

from collections.abc import Sequence

from measuring.engines import Workload
from measuring.sleeping import sleeping_workload

LAYERS_PER_STAGE = 4
HEAD_SHARE = 0.3
"""What an auxiliary head takes for forward and backward, relative to the forward of a stage."""


def equal_bounds(num_stages: int) -> list[int]:
    """Where equal stages are cut."""
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
