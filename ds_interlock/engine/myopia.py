"""``"interlock": {"myopia": ...}``: the cosines of ``stage/myopia.py`` on a pipeline, beside the training.

Before every n-th batch its first micro-batch goes through the pipe under the plan in force and under
ordinary backpropagation, in programs without an optimizer step; then the batch is trained on as ever. Stages
wait for each other only as the two programs make them wait.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ds_interlock.engine.data import TrainingData
from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.engine.runner import StageRunner
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.myopia import (
    Probe,
    cosine,
    gradient_products,
    probe_program,
    unchanged_buffers,
    unchanged_random_state,
)
from ds_interlock.transport.ranks import StageRanks


class MyopiaMeter:
    """Measures as ``interlock.myopia`` says."""

    def __init__(
        self, engine: DeepSpeedSide, ranks: StageRanks, data: TrainingData, runner: StageRunner
    ) -> None:
        self._config = runner.config.myopia
        self._engine = engine
        self._ranks = ranks
        self._data = data
        self._runner = runner
        self._cosine: float | None = None

    def before_batch(self) -> None:
        """Measures before every n-th batch of the run. All ranks must call it."""
        plan = self._engine.module.plan
        if self._config is None or self._engine.global_steps % self._config.every != 0:
            return
        if plan.is_end_to_end:
            self._cosine = 1.0
            return
        micro_batch = self._data.read() if self._ranks.is_first_stage else None
        end_to_end = GradientFlowPlan.end_to_end(stage_bounds=plan.stage_bounds)
        truncated, whole = (self._gradients(each, micro_batch) for each in (plan, end_to_end))
        products = gradient_products(truncated, whole)
        self._ranks.sum_over_slices(products)
        self._cosine = cosine(products)
        self._put_back(micro_batch)

    def take_cosine(self) -> float | None:
        """The cosine of this batch, once; None if it was not measured."""
        measured, self._cosine = self._cosine, None
        return measured

    def _gradients(self, plan: GradientFlowPlan, micro_batch: Any) -> list[Tensor]:
        """The gradient of this stage's layers under ``plan``, summed over the replicas."""
        probe = Probe(self._engine.module.layer_parameters())
        self._put_back(micro_batch)
        with self._nothing_changed():
            self._runner.run_beside_training(probe_program(plan), probe, record=False)
        for gradient in probe.gradients:
            self._ranks.sum_over_replicas(gradient)
        return probe.gradients

    def _put_back(self, micro_batch: Any) -> None:
        if self._ranks.is_first_stage:
            self._data.put_back(micro_batch)

    @contextmanager
    def _nothing_changed(self) -> Iterator[None]:
        module = self._engine.module
        micro_offset = module.micro_offset
        try:
            with unchanged_random_state(self._ranks.device), unchanged_buffers(module):
                yield
        finally:
            module.micro_offset = micro_offset
