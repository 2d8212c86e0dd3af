"""A plan in one process: all stages of a pipeline on one device, with the same numbers.

For research (one GPU, many stages), and to see what gradients a plan gives. Names of parameters are those of
the pipeline: ``3.weight`` for layer 3, ``heads.0.…`` for the head of loss 0.

    net = InProcessPipeline(layers, loss_fn, GradientFlowPlan.n_wise(4, window=2), head=make_head)
    losses = net.accumulate_gradients(micro_batches)
    optimizer.step()

With a ``PlanSchedule`` the heads of all phases exist when the optimizer is made; the plan is still changed by
hand, with ``net.change_plan(net.schedule.plan_at(step))``. The copies that heads of type ``shared`` read with
are renewed by themselves: a call of ``accumulate_gradients`` is a batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_interlock.errors import ConfigError, ScheduleError
from ds_interlock.schedule.action import Action
from ds_interlock.schedule.dependency import receive_of
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.phases import PlanSchedule
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.program import evaluation_program, training_program
from ds_interlock.stage.backward import Backward
from ds_interlock.stage.heads import Heads, MakeHead, build_head
from ds_interlock.stage.hidden import Hidden, copied
from ds_interlock.stage.interpreter import Interpreter, steps
from ds_interlock.stage.shared_readout import SharedReadout
from ds_interlock.stage.work import LossFn, StageWork

MicroBatch = tuple[Hidden, Any]


class InProcessPipeline(nn.Module):
    """All stages of a plan, trained in one process.

    Args:
        layers: The model's layers, built: modules or callables, each taking the last one's result.
        loss_fn: ``loss_fn(outputs, labels)``, a scalar.
        plan: The gradient flow, its last stage bound ``len(layers)``; or a schedule of such plans, the
            first of which is then in force.
        head: Builds an auxiliary head from its ``LossHead``; not needed without any.

    Raises:
        ConfigError: If plan, layers and head do not fit together.
    """

    def __init__(
        self,
        layers: Iterable[Callable[[Any], Any]],
        loss_fn: LossFn | None,
        plan: GradientFlowPlan | PlanSchedule,
        head: MakeHead | None = None,
    ) -> None:
        super().__init__()
        self.layers_in_order = list(layers)
        self.schedule = plan if isinstance(plan, PlanSchedule) else PlanSchedule.constant(plan)
        self._functions = loss_fn, head  # in a tuple: a module among them is no part of the model
        num_layers = self.schedule.stage_bounds[-1]
        if len(self.layers_in_order) != num_layers:
            raise ConfigError(f"the plan is for {num_layers} layers, got {len(self.layers_in_order)}")
        for number, layer in enumerate(self.layers_in_order):
            if isinstance(layer, nn.Module):
                self.add_module(str(number), layer)
        self.heads = Heads()
        self.shared: SharedReadout | None = None
        for phase in self.schedule.phases:
            self._add_heads(phase.plan)
        self._enter(self.schedule.phases[0].plan)

    def change_plan(self, plan: GradientFlowPlan) -> None:
        """From now on gradients flow as ``plan`` says, which is for the same layers in the same stages.

        Heads at new positions are built, and an earlier optimizer does not know them. Heads that ``plan``
        lacks stay in ``heads`` and get no gradient: after ``zero_grad()`` no optimizer of torch changes them.

        Raises:
            ConfigError: If the stages differ, or nothing can build the heads.
        """
        if plan == self.plan:
            return
        if plan.stage_bounds != self.plan.stage_bounds:
            got, bounds = list(plan.stage_bounds), list(self.plan.stage_bounds)
            raise ConfigError(f"change_plan: got a plan for stage_bounds {got}, expected {bounds}")
        self._add_heads(plan, like=next((p for p in self.parameters() if p.is_floating_point()), None))
        self._enter(plan)

    def accumulate_gradients(self, micro_batches: Sequence[MicroBatch]) -> dict[int, Tensor]:
        """Adds the gradients of one batch, of ``(inputs, labels)`` each, to ``.grad`` of every parameter.

        Returns:
            The mean of every loss, by its index in ``plan.heads``.
        """
        self.train()
        if self.shared is not None:
            layer = self.shared.source.layer
            self.shared.begin_batch(self.shared.source.weights_in(self.layers_in_order[layer]))
        return run_program(training_program(self.plan, len(micro_batches)), self.stages, micro_batches)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> dict[int, Tensor]:
        """The mean of every loss over ``micro_batches``, in evaluation mode and without gradients."""
        self.eval()
        program = evaluation_program(self.plan, len(micro_batches), all_heads=True)
        return run_program(program, self.stages, micro_batches)

    def stage_works(
        self, plan: GradientFlowPlan, backward: Sequence[Backward] | None = None
    ) -> list[StageWork]:
        """The work of every stage under ``plan``; gradients go to ``backward``, by default to ``.grad``."""
        loss_fn, _ = self._functions
        return [
            StageWork(
                plan,
                stage,
                self._run_layers,
                self.layer_parameters(stage, frozen=True),
                self.heads.by_loss(plan, stage),
                loss_fn,
                backward[stage] if backward else Backward(),
            )
            for stage in range(plan.num_stages)
        ]

    def layer_parameters(self, stage: int, *, frozen: bool = False) -> list[nn.Parameter]:
        """The trainable parameters of the layers of ``stage``; the ``frozen`` ones too if asked for."""
        start, stop = self.schedule.stage_bounds[stage : stage + 2]
        modules = (layer for layer in self.layers_in_order[start:stop] if isinstance(layer, nn.Module))
        return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad or frozen]

    def _enter(self, plan: GradientFlowPlan) -> None:
        self.plan = plan
        self.stages = self.stage_works(plan)

    def _add_heads(self, plan: GradientFlowPlan, like: Tensor | None = None) -> None:
        """Builds the heads of ``plan`` at positions that have none yet; on the device of ``like``."""
        _, make_head = self._functions
        if make_head is None and not plan.is_end_to_end:
            raise ConfigError("the plan has auxiliary losses: pass head=, LossHead -> torch.nn.Module")
        for head in plan.heads[:-1]:
            if not self.heads.has(head):
                assert make_head is not None
                number = len(self.heads)
                module = build_head(make_head, number, head)
                self.heads.add(number, head, module if like is None else module.to(like.device, like.dtype))
        copies = SharedReadout.copies_in(self.heads.values())
        if self.shared is not None:
            self.shared.join(copies)
        elif copies:
            self.shared = SharedReadout(copies)

    def _run_layers(self, hidden: Hidden, start: int, stop: int) -> Hidden:
        for layer in self.layers_in_order[start:stop]:
            hidden = layer(hidden)
        return hidden


class _Mailbox(dict[Action, tuple[Any, ...]]):
    """The messenger of one process: messages by their receives."""

    def post(self, receive: Action, batch: int) -> None:
        """A dictionary needs no announcement."""

    def take(self, receive: Action) -> tuple[Any, ...]:
        return self.pop(receive)

    def send(self, send: Action, batch: int, *structures: Any) -> None:
        self[receive_of(send)] = copied(structures)


def run_program(
    program: Program, stages: Sequence[StageWork], micro_batches: Sequence[MicroBatch]
) -> dict[int, Tensor]:
    """Runs one batch of ``program``; returns the mean of every loss, by its index in ``plan.heads``."""
    mailbox = _Mailbox()
    interpreters = [Interpreter(work, mailbox, lambda m: copied(micro_batches[m])) for work in stages]
    for interpreter in interpreters:
        interpreter.begin_batch(0, len(micro_batches))
    left = [deque(steps(program, stage)) for stage in range(len(stages))]
    while any(left):
        is_stuck = True
        for interpreter, of_stage in zip(interpreters, left, strict=True):
            while of_stage and all(receive in mailbox for receive in of_stage[0].takes):
                interpreter.run(*of_stage.popleft())
                is_stuck = False
        if is_stuck:
            raise ScheduleError("the stages wait for each other: this program cannot be run")
    losses = {loss: mean for work in stages for loss, mean in work.mean_losses().items()}
    for work in stages:
        work.begin_batch(1)  # frees what they hold
    return losses
