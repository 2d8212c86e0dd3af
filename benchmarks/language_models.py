"""Language models in stages in one process, as several benchmarks train them."""

from ds_interlock import GradientFlowPlan, HeadConfig, InProcessPipeline
from ds_interlock.heads.factory import head_factory
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss

GLOBAL = "global"


def pipeline_of(
    config: LMConfig, window: float | None, num_stages: int, head: HeadConfig
) -> InProcessPipeline:
    """A window, or global backpropagation (None), over stages of as many blocks each."""
    inner = [2 + config.num_blocks * stage // num_stages for stage in range(1, num_stages)]
    bounds = [0, *inner, config.num_layers]
    plan = GradientFlowPlan.n_wise(window=window or num_stages, stage_bounds=bounds)
    return InProcessPipeline(build_lm(config), lm_loss(), plan, head_factory(head, lm_layers(config)))
