"""``"interlock": {"myopia": ...}``: the cosines of ``stage/myopia.py`` on a pipeline, beside the training.

Before every n-th batch its first micro-batch goes through the pipe under the plan in force and under
ordinary backpropagation, in programs without an optimizer step; then the batch is trained on as ever.
"""

from typing import Any

from torch import Tensor

from ds_interlock.engine.runner import StageRunner
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.myopia import (
    Probe,
    cosine,
    gradient_products,
    probe_program,
    unchanged_random_state,
)
from ds_interlock.stage.recomputation import BuffersKept


class MyopiaMeter:
    """Measures as ``interlock.myopia`` says."""

    def __init__(self, runner: StageRunner) -> None:
        self._runner = runner
        self._module = runner.engine.module
        self._ranks = runner.ranks
        self._cosine: float | None = None

    def before_batch(self) -> None:
        """Measures before every n-th batch of the run. All ranks must call it."""
        plan, config = self._module.plan, self._runner.config.myopia
        if config is None or self._runner.engine.global_steps % config.every != 0:
            return
        if plan.is_end_to_end:
            self._cosine = 1.0
            return
        micro_batch = self._runner.data.read() if self._ranks.is_first_stage else None
        end_to_end = GradientFlowPlan.end_to_end(stage_bounds=plan.stage_bounds)
        truncated, whole = (self._gradients(each, micro_batch) for each in (plan, end_to_end))
        products = gradient_products(truncated, whole)
        self._ranks.sum_over_slices(products)
        self._cosine = cosine(products)
        self._runner.data.put_back(micro_batch)

    def take_cosine(self) -> float | None:
        """The cosine of this batch, once; None if it was not measured."""
        measured, self._cosine = self._cosine, None
        return measured

    def _gradients(self, plan: GradientFlowPlan, micro_batch: Any) -> list[Tensor]:
        """The gradient of this stage's layers under ``plan``, summed over the replicas."""
        module, probe = self._module, Probe(self._module.layer_parameters())
        self._runner.data.put_back(micro_batch)
        micro_offset = module.micro_offset
        with unchanged_random_state(self._ranks.device), BuffersKept([module]):
            self._runner.run_beside_training(probe_program(plan), probe, record=False)
        module.micro_offset = micro_offset
        for gradient in probe.gradients:
            self._ranks.sum_over_replicas(gradient)
        return probe.gradients
