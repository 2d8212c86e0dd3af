"""Fitting the heads alone: the layers go forward as in training, and nothing but heads learns.

    stage k       layers ───────┬──────────────────────────► stage k + 1        no graph is built
                                └► head ─► loss ─► gradient of the head's own parameters
                                                       │
                     mean over the replicas ◄──────────┘
                          └► AdamW, on float32 copies ─► the head's parameters ─► DeepSpeed's master copies

A head that has not learned to read the layers in front of it sends them gradients that say little about
the text. On a pretrained model these undo in a few steps what was learned before; so the heads first learn
to read what is there. No stage waits for one behind it, and DeepSpeed's optimizer takes no part.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from deepspeed.utils import logger, safe_set_full_fp32_param
from torch import Tensor, nn
from torch import distributed as dist

from ds_interlock.engine.instructions import InterlockSchedule
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.lower import Program, evaluation_program
from ds_interlock.schedule.plan import GradientFlowPlan, loss_name
from ds_interlock.stage.work import StageWork


def head_program(plan: GradientFlowPlan, num_micro_batches: int) -> Program:
    """The program of one batch in which only auxiliary heads learn: evaluation without the final loss."""
    program = evaluation_program(plan, num_micro_batches, all_heads=True)
    stages = tuple(
        tuple(a for a in actions if a.kind is not Kind.HEAD or a.losses != (plan.final,))
        for actions in program.stages
    )
    return replace(program, stages=stages)


class HeadWork(StageWork):
    """The work of one stage while its heads are fitted. To be carried out without a graph."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.parameters_of = {
            loss: [parameter for parameter in head.parameters() if parameter.requires_grad]
            for loss, head in self.heads.items()
        }
        self.gradients = {
            parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.head_parameters
        }
        """Of the batch so far, summed in float32."""

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of all heads of this stage."""
        return [parameter for parameters in self.parameters_of.values() for parameter in parameters]

    def begin_batch(self, num_micro_batches: int) -> None:
        super().begin_batch(num_micro_batches)
        for gradient in self.gradients.values():
            gradient.zero_()

    def _head(self, action: Action) -> None:
        entry = self._in_flight[action.micro_batch]
        (loss,) = action.losses
        parameters = self.parameters_of[loss]
        with torch.enable_grad():
            value = self._loss_at(loss, entry.hidden[self.plan.heads[loss].after_layer], entry.labels)
        self._add_loss(loss, value)
        if not parameters:
            return
        # Not backward(): DeepSpeed's hooks would take what arrives in .grad for a step of its own.
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                self.gradients[parameter].add_(gradient, alpha=1 / self.num_micro_batches)


class HeadOptimizer:
    """AdamW without weight decay on float32 copies of the heads' parameters."""

    def __init__(self, parameters: list[nn.Parameter], learning_rate: float) -> None:
        self._masters = {parameter: parameter.detach().float().clone() for parameter in parameters}
        masters = list(self._masters.values())
        self._optimizer = torch.optim.AdamW(masters, learning_rate, weight_decay=0.0) if masters else None

    @torch.no_grad()
    def step(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """One step; the parameters follow their copies."""
        if self._optimizer is None:
            return
        for parameter, master in self._masters.items():
            master.grad = gradients[parameter]
        self._optimizer.step()
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def tell_deepspeed(self) -> None:
        """DeepSpeed's bf16 and ZeRO optimizers step copies of their own, and would undo what was learned."""
        for parameter, master in self._masters.items():
            safe_set_full_fp32_param(parameter, master)


class WarmHeadsMixin:
    """``fit_heads`` of the engine, and the warm-up in front of the first training batch."""

    _work: StageWork
    _heads_are_fitted = False

    def fit_heads(
        self: Any, data_iter: Iterator[Any] | None = None, num_steps: int = 1
    ) -> dict[str, list[float]]:
        """Fits the auxiliary heads for some batches; layers and optimizer stay as they are, bit for bit.

        Those of all phases of a schedule are fitted, also the ones that are not in use yet.

        ``interlock.head.warmup_steps`` does this in front of the first training batch, unless it has been
        done by hand. All ranks must call it. Without auxiliary heads it does nothing, and reads no data.

        Args:
            data_iter: Iterator over ``(inputs, labels)``, as for ``train_batch``. Only stage 0 reads it.
            num_steps: Batches to read, of as many micro-batches as in training.

        Returns:
            The losses of this stage's heads, by name (see ``loss_name``), batch by batch.
        """
        self._heads_are_fitted = True
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        plan = self.module.schedule.plan_with_all_heads
        if len(plan.heads) == 1:
            return {}
        self.module.train()
        schedule = InterlockSchedule(head_program(plan, self.micro_batches), self.stage_id)
        training, work = self._work, self._work_of(plan, HeadWork)
        optimizer = HeadOptimizer(work.head_parameters, self.module.head_config.warmup_learning_rate)
        self._work = work
        try:
            losses = [self._fit_heads_to_a_batch(schedule, work, optimizer) for _ in range(num_steps)]
        finally:
            self._work = training
        optimizer.tell_deepspeed()
        told: dict[str, list[float]] = self._told_losses(plan, losses)
        return told

    def _warm_up_heads(self: Any) -> None:
        """Before the first batch of a new run; a resumed one has heads that are further than that."""
        num_steps = self.module.head_config.warmup_steps
        if num_steps > 0 and self.global_steps == 0 and not self._heads_are_fitted:
            self.fit_heads(num_steps=num_steps)

    def _fit_heads_to_a_batch(
        self: Any, schedule: InterlockSchedule, work: HeadWork, optimizer: HeadOptimizer
    ) -> dict[int, Tensor]:
        with torch.no_grad():
            self._run(schedule)
        if self.is_data_parallel:
            for gradient in work.gradients.values():
                dist.all_reduce(gradient, group=self.grid.get_data_parallel_group())
                gradient /= self.dp_world_size
        optimizer.step(work.gradients)
        losses: dict[int, Tensor] = self._average_over_replicas(work.mean_losses())
        return losses

    def _told_losses(
        self: Any, plan: GradientFlowPlan, losses: list[dict[int, Tensor]]
    ) -> dict[str, list[float]]:
        told = {
            loss_name(plan, loss): [float(of_batch[loss]) for of_batch in losses]
            for loss in (losses[0] if losses else ())
        }
        if self.grid.get_data_parallel_rank() == 0:
            for name, values in told.items():
                message = "interlock: head of %s fitted for %d batches: %.4g to %.4g"
                logger.info(message, name, len(values), values[0], values[-1])
        return told
