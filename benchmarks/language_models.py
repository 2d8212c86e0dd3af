"""Language models in stages, as several benchmarks train them."""

from ds_interlock import GradientFlowPlan
from ds_interlock.models.lm import LMConfig

GLOBAL = "global"


def plan_of(window: float | None, config: LMConfig, num_stages: int) -> GradientFlowPlan:
    """A window, or global backpropagation (None), over stages of as many blocks each."""
    inner = [2 + config.num_blocks * stage // num_stages for stage in range(1, num_stages)]
    bounds = [0, *inner, config.num_layers]
    return GradientFlowPlan.n_wise(window=window or num_stages, stage_bounds=bounds)
