"""Language models in stages, as several benchmarks train them."""

from ds_interlock import GradientFlowPlan
from ds_interlock.models.lm import LMConfig

GLOBAL = "global"


def stage_bounds(config: LMConfig, num_stages: int) -> list[int]:
    """Stages of as many blocks each; the embeddings in the first, the output layers in the last."""
    inner = [2 + config.num_blocks * stage // num_stages for stage in range(1, num_stages)]
    return [0, *inner, config.num_layers]


def plan_of(window: float | None, bounds: list[int]) -> GradientFlowPlan:
    """The plan of a window of stages; None for global backpropagation."""
    if window is None:
        return GradientFlowPlan.end_to_end(stage_bounds=bounds)
    return GradientFlowPlan.n_wise(window=window, stage_bounds=bounds)
