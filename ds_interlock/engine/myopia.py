"""``"interlock": {"myopia": ...}``: the cosines of ``stage/myopia.py`` on a pipeline, beside the training.

Before every n-th batch its first micro-batch goes through the pipe under the plan in force and under
ordinary backpropagation, in programs without an optimizer step; then the batch is trained on as ever.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_interlock.engine.runner import StageRunner
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.myopia import Probe, cosine, gradient_products, probe_program, unchanged_random_state
from ds_interlock.stage.recomputation import BuffersKept


@dataclass
class MyopiaMeter:
    """Measures as ``interlock.myopia`` says."""

    runner: StageRunner
    _cosine: float | None = None

    def before_batch(self) -> None:
        """Measures before every n-th batch of the run. All ranks must call it."""
        plan, config = self.runner.engine.module.plan, self.runner.config.myopia
        if config is None or self.runner.engine.global_steps % config.every != 0:
            return
        if plan.is_end_to_end:
            self._cosine = 1.0
            return
        micro_batch = self.runner.data.read() if self.runner.ranks.is_first_stage else None
        end_to_end = GradientFlowPlan.end_to_end(stage_bounds=plan.stage_bounds)
        truncated, whole = (self._gradients(each, micro_batch) for each in (plan, end_to_end))
        products = gradient_products(truncated, whole)
        self.runner.ranks.sum_over_slices(products)
        self._cosine = cosine(products)
        self.runner.data.put_back(micro_batch)

    def take_cosine(self) -> float | None:
        """The cosine of this batch, once; None if it was not measured."""
        measured, self._cosine = self._cosine, None
        return measured

    def global_gradients(self, data_iter: Iterator[Any]) -> dict[str, Tensor]:
        """The gradients of this stage's layers under ordinary backpropagation, by parameter; no dropout.

        ``data_iter`` gives one micro-batch, on the first stage. All ranks must call it; replicas are not
        averaged.
        """
        engine, module = self.runner.engine, self.runner.engine.module
        training_data, micro_offset = engine.data_iterator, module.micro_offset
        parameters = module.layer_parameters()
        probe = Probe(parameters)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        module.eval()
        engine.data_iterator = data_iter
        try:
            plan = GradientFlowPlan.end_to_end(stage_bounds=module.plan.stage_bounds)
            self.runner.run_beside_training(probe_program(plan), probe, record=False)
        finally:
            engine.data_iterator, module.micro_offset = training_data, micro_offset
            module.train()
        return {names[id(p)]: gradient for p, gradient in zip(parameters, probe.gradients, strict=True)}

    def _gradients(self, plan: GradientFlowPlan, micro_batch: Any) -> list[Tensor]:
        """The gradient of this stage's layers under ``plan``, summed over the replicas."""
        module = self.runner.engine.module
        probe = Probe(module.layer_parameters())
        self.runner.data.put_back(micro_batch)
        micro_offset = module.micro_offset
        with unchanged_random_state(self.runner.ranks.device), BuffersKept([module]):
            self.runner.run_beside_training(probe_program(plan), probe, record=False)
        module.micro_offset = micro_offset
        for gradient in probe.gradients:
            self.runner.ranks.sum_over_replicas(gradient)
        return probe.gradients
