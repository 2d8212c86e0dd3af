"""``"interlock": {"myopia": ...}``: the cosines of ``myopia.py`` on a pipeline, beside the training.

In front of every n-th batch its first micro-batch goes through the pipe under the plan in force and under
ordinary backpropagation, in programs without an optimizer step; then the batch is trained on as ever. No
stage has to wait for it but as the two programs make it wait.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch import distributed as dist

from ds_interlock.engine.instructions import InterlockSchedule
from ds_interlock.engine.timeline import Recorder
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.myopia import (
    ProbeWork,
    cosine,
    gradient_products,
    probe_program,
    unchanged_buffers,
    unchanged_random_state,
)
from ds_interlock.stage.work import StageWork

COSINE = "gradient_cosine"
"""The name in reports."""


class MyopiaMixin:
    """The meter of the engine: ``interlock.myopia``."""

    _work: StageWork
    _samples_ahead: list[Any]
    """On stage 0 the micro-batch that was measured on and that training has yet to read."""
    _cosine: float | None = None
    """As measured in front of this batch; None if it was not."""

    def _measure_myopia(self: Any) -> None:
        """Measures in front of every n-th batch of the run. All ranks must call it."""
        myopia = self.interlock.myopia
        if myopia is None or self.global_steps % myopia.every != 0:
            return
        if self.plan.is_end_to_end:
            self._cosine = 1.0
            return
        samples = [self._next_batch()] if self.is_first_stage() else []
        end_to_end = GradientFlowPlan.end_to_end(stage_bounds=self.plan.stage_bounds)
        truncated, whole = (self._gradients_under(plan, samples) for plan in (self.plan, end_to_end))
        products = gradient_products(truncated, whole)
        if self.is_model_parallel:
            dist.all_reduce(products, group=self.grid.get_slice_parallel_group())
        self._cosine = cosine(products)
        self._samples_ahead = samples

    def _gradients_under(self: Any, plan: GradientFlowPlan, samples: Sequence[Any]) -> list[Tensor]:
        """The gradient of this stage's layers under ``plan``, averaged over the replicas."""
        probe = self._work_of(plan, ProbeWork)
        self._samples_ahead = list(samples)
        with self._beside_training(probe):
            self._run(InterlockSchedule(probe_program(plan), self.stage_id))
        if self.is_data_parallel:
            for gradient in probe.gradients:
                dist.all_reduce(gradient, group=self.grid.get_data_parallel_group())
        gradients: list[Tensor] = probe.gradients
        return gradients

    @contextmanager
    def _beside_training(self: Any, work: ProbeWork) -> Iterator[None]:
        """Puts ``work`` in place of that of training, of which nothing is changed or recorded."""
        training, recorder, micro_offset = self._work, self._recorder, self.module.micro_offset
        self._work, self._recorder = work, Recorder(get_accelerator().synchronize)
        try:
            with unchanged_random_state(self.device), unchanged_buffers(self.module):
                yield
        finally:
            self._work, self._recorder, self.module.micro_offset = training, recorder, micro_offset

    def _take_cosine(self: Any) -> float | None:
        measured: float | None = self._cosine
        self._cosine = None
        return measured
