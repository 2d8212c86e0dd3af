"""Fitting the heads alone: the layers go forward as in training, and nothing but heads learns.

    stage k       layers ───────┬──────────────────────────► stage k + 1        no graph is built
                                └► head ─► loss ─► gradient of the head's own parameters
                                                       │
                     mean over the replicas ◄──────────┘
                          └► AdamW, on float32 copies ─► the head's parameters ─► DeepSpeed's master copies

On a pretrained model the gradients of a head that cannot read its hidden state yet undo in a few steps what
was learned before. No stage waits for a later one, and DeepSpeed's optimizer takes no part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from deepspeed.utils import logger, safe_set_full_fp32_param
from torch import Tensor, nn

from ds_interlock.engine.runner import StageRunner, without_loss
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.plan import GradientFlowPlan, loss_name
from ds_interlock.schedule.program import evaluation_program
from ds_interlock.stage.backward import Backward, HeadLoss
from ds_interlock.stage.hidden import Gradients, Hidden


def head_program(plan: GradientFlowPlan, num_micro_batches: int) -> Program:
    """The program of one batch in which only auxiliary heads learn: evaluation without the final loss."""
    return without_loss(evaluation_program(plan, num_micro_batches, all_heads=True), plan.final)


class HeadOptimizer(Backward):
    """Steps heads with AdamW on float32 copies of their parameters. To be used under ``no_grad``."""

    def __init__(self, heads: Mapping[int, nn.Module], learning_rate: float) -> None:
        super().__init__()
        self._parameters = {
            loss: [parameter for parameter in head.parameters() if parameter.requires_grad]
            for loss, head in heads.items()
        }
        every = chain.from_iterable(self._parameters.values())
        self._masters = {parameter: parameter.detach().float().clone() for parameter in every}
        self.gradients = {parameter: torch.zeros_like(master) for parameter, master in self._masters.items()}
        masters = list(self._masters.values())
        self._optimizer = torch.optim.AdamW(masters, learning_rate, weight_decay=0.0) if masters else None

    def head(self, loss: HeadLoss, hidden: Hidden) -> Gradients:
        """Adds to ``gradients``; the hidden state gets none."""
        parameters = self._parameters[loss.loss]
        with torch.enable_grad():
            value = loss.of(hidden)
        if parameters:
            # Not backward(): DeepSpeed's hooks would take what arrives in .grad for a step of its own.
            gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                self.gradients[parameter].add_(gradient, alpha=1 / loss.num_micro_batches)
        return ()

    @torch.no_grad()
    def step(self) -> None:
        """One step, after which ``gradients`` are 0; the parameters follow their copies."""
        if self._optimizer is None:
            return
        for parameter, master in self._masters.items():
            master.grad = self.gradients[parameter]
        self._optimizer.step()
        for parameter, master in self._masters.items():
            parameter.copy_(master)
            self.gradients[parameter].zero_()

    def update_masters_of_deepspeed(self) -> None:
        """DeepSpeed's bf16 and ZeRO optimizers step copies of their own, and would undo what was learned."""
        for parameter, master in self._masters.items():
            safe_set_full_fp32_param(parameter, master)


@dataclass
class HeadWarmup:
    """Fits the auxiliary heads of this stage, those of all phases of a schedule."""

    runner: StageRunner
    is_due: bool = False
    """To be set where a run is resumed that has heads which it had not before."""
    _is_done: bool = False

    def before_batch(self) -> None:
        """Before the first batch of a new run; the heads of a resumed one are already further."""
        engine = self.runner.engine
        num_steps = engine.module.head_config.warmup_steps or 0
        if num_steps > 0 and (self.is_due or (engine.global_steps == 0 and not self._is_done)):
            self.fit(None, num_steps)

    def fit(self, data_iter: Iterator[Any] | None, num_steps: int) -> dict[str, list[float]]:
        """Fits the heads for ``num_steps`` batches; returns their losses by name, batch by batch."""
        engine = self.runner.engine
        module, plan = engine.module, engine.module.schedule.plan_with_all_heads
        self._is_done, self.is_due = True, False
        if data_iter is not None:
            engine.set_dataiterator(data_iter)
        if len(plan.heads) == 1:
            return {}
        module.train()
        program = head_program(plan, engine.micro_batches)
        heads = module.heads.by_loss(plan, self.runner.ranks.stage)
        optimizer = HeadOptimizer(heads, module.head_config.warmup_learning_rate)
        losses = [self._fit_to_a_batch(program, optimizer) for _ in range(num_steps)]
        optimizer.update_masters_of_deepspeed()
        return self._by_name(plan, losses)

    def _fit_to_a_batch(self, program: Program, optimizer: HeadOptimizer) -> dict[int, Tensor]:
        with torch.no_grad():
            work = self.runner.run_beside_training(program, optimizer, record=True)
        for gradient in optimizer.gradients.values():
            self.runner.ranks.sum_over_replicas(gradient)
            gradient /= self.runner.ranks.num_replicas
        optimizer.step()
        return self.runner.ranks.average_over_replicas(work.mean_losses())

    def _by_name(self, plan: GradientFlowPlan, losses: list[dict[int, Tensor]]) -> dict[str, list[float]]:
        by_name = {
            loss_name(plan, loss): [float(of_batch[loss]) for of_batch in losses]
            for loss in (losses[0] if losses else ())
        }
        if self.runner.ranks.replica == 0:
            for name, values in by_name.items():
                message = "interlock: head of %s fitted for %d batches: %.4g to %.4g"
                logger.info(message, name, len(values), values[0], values[-1])
        return by_name
