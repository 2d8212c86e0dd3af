"""A plan in one process: all stages of a pipeline on one device, with the same numbers.

The program of every stage is carried out by the same ``StageWork`` as on a real pipeline; a message
is an entry in a dictionary. This is the research mode (one GPU, many stages) and the fast way to
test what gradients a plan gives. Parameter names are those of the pipeline: ``3.weight`` for layer
3, ``heads.0.…`` for the head of loss 0.

    net = InProcessPipeline(layers, loss_fn, GradientFlowPlan.n_wise(4, window=2), head=make_head)
    losses = net.accumulate_gradients(micro_batches)
    optimizer.step()

A run whose plan changes on the way is given a ``PlanSchedule``, so that the heads of all its phases are
there when the optimizer is made, and is told when to go on:

    net = InProcessPipeline(layers, loss_fn, PlanSchedule.of((0, local), (2000, wider)), head=make_head)
    for step in range(num_steps):
        net.change_plan(net.schedule.plan_at(step))
        ...
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ds_interlock.errors import ConfigError, ScheduleError
from ds_interlock.schedule.action import RECV_KINDS, Action, Kind
from ds_interlock.schedule.lower import (
    Program,
    evaluation_program,
    receive_of,
    receives_needed,
    send_of,
    training_program,
)
from ds_interlock.schedule.phases import PlanSchedule
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead
from ds_interlock.stage.work import Hidden, LossFn, StageWork

MakeHead = Callable[[LossHead], nn.Module]
MicroBatch = tuple[Hidden, Any]
AnyStageWork = TypeVar("AnyStageWork", bound=StageWork)


def build_head(make_head: MakeHead, loss: int, head: LossHead, seed: int = 1234) -> nn.Module:
    """Builds the head of ``loss`` from a seed of its own.

    A head then starts with the same weights however the stages are spread over processes, and
    building it leaves the random state that the layers are drawn from untouched.

    Raises:
        ConfigError: If ``make_head`` does not return a module.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed + loss)
        module = make_head(head)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"head({head}) returned {type(module).__name__}: expected a torch.nn.Module that maps a "
            "hidden state to what the model's last layer returns"
        )
    return module


class _Given(NamedTuple):
    """The user's functions. As attributes of the pipeline, those that are modules would be part of it."""

    loss_fn: LossFn | None
    make_head: MakeHead | None


class InProcessPipeline(nn.Module):
    """All stages of a plan, trained in one process.

    Args:
        layers: The model's layers, built: modules or callables, each taking the last one's result.
        loss_fn: ``loss_fn(outputs, labels)``, a scalar.
        plan: The gradient flow, its last stage bound ``len(layers)``; or a schedule of such plans, the
            first of which is then in force.
        head: Builds an auxiliary head from its ``LossHead``; not needed if there is none.

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
        self._given = _Given(loss_fn, head)
        num_layers = self.schedule.stage_bounds[-1]
        if len(self.layers_in_order) != num_layers:
            raise ConfigError(f"the plan is for {num_layers} layers, got {len(self.layers_in_order)}")
        for number, layer in enumerate(self.layers_in_order):
            if isinstance(layer, nn.Module):
                self.add_module(str(number), layer)
        self.heads = nn.ModuleDict()
        self._head_names: dict[int, str] = {}
        for phase in self.schedule.phases:
            self._add_heads(phase.plan)
        self._enter(self.schedule.phases[0].plan)

    def change_plan(self, plan: GradientFlowPlan) -> None:
        """From now on gradients flow as ``plan`` says. Layers keep their parameters.

        A head at a place where there was one before, in any plan, is that very module; others are built
        and added to ``heads``, and an optimizer made before does not know them (a ``PlanSchedule`` avoids
        that). Heads that ``plan`` lacks stay in ``heads`` and get no gradient: set the old ones to None
        (``zero_grad()``), and no optimizer of torch changes them.

        Args:
            plan: For the same layers in the same stages.

        Raises:
            ConfigError: If it is not, or has heads and there is nothing to build them with.
        """
        if plan == self.plan:
            return
        if plan.stage_bounds != self.plan.stage_bounds:
            raise ConfigError(
                f"change_plan: got a plan for stage_bounds {list(plan.stage_bounds)}, expected those of the "
                f"plan in force, {list(self.plan.stage_bounds)}"
            )
        self._add_heads(plan, like=next((p for p in self.parameters() if p.is_floating_point()), None))
        self._enter(plan)

    def accumulate_gradients(self, micro_batches: Sequence[MicroBatch]) -> dict[int, Tensor]:
        """Adds the gradients of one batch to ``.grad`` of every parameter.

        Args:
            micro_batches: ``(inputs, labels)`` each.

        Returns:
            The mean of every loss, by its index in ``plan.heads``.
        """
        self.train()
        return self._run(training_program(self.plan, len(micro_batches)), micro_batches)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> dict[int, Tensor]:
        """The mean of every loss over ``micro_batches``, in evaluation mode and without gradients."""
        self.eval()
        return self._run(evaluation_program(self.plan, len(micro_batches), all_heads=True), micro_batches)

    def carry_out(
        self, program: Program, stages: Sequence[StageWork], micro_batches: Sequence[MicroBatch]
    ) -> dict[int, Tensor]:
        """Runs a program of any plan for these layers on ``stages``; returns the mean of every loss."""
        return _Run(program, stages, micro_batches).losses()

    def stage_works(self, plan: GradientFlowPlan, kind: type[AnyStageWork]) -> list[AnyStageWork]:
        """The work of every stage under ``plan``, whose heads must be there."""
        return [
            kind(
                plan,
                stage,
                self._run_layers,
                self.layer_parameters(stage),
                {
                    loss: self.heads[self._head_names[plan.heads[loss].after_layer]]
                    for loss in plan.losses_at(stage)
                    if loss != plan.final
                },
                self._given.loss_fn,
            )
            for stage in range(plan.num_stages)
        ]

    def layer_parameters(self, stage: int) -> list[nn.Parameter]:
        """The trainable parameters of the layers of ``stage``."""
        layers = [self.layers_in_order[number] for number in self.schedule.phases[0].plan.layers(stage)]
        parameters = {
            id(parameter): parameter
            for layer in layers
            if isinstance(layer, nn.Module)
            for parameter in layer.parameters()
            if parameter.requires_grad
        }
        return list(parameters.values())

    def _enter(self, plan: GradientFlowPlan) -> None:
        self.plan = plan
        self.stages = self.stage_works(plan, StageWork)

    def _add_heads(self, plan: GradientFlowPlan, like: Tensor | None = None) -> None:
        """Builds the heads of ``plan`` at places where there is none yet; on the device of ``like``."""
        make_head = self._given.make_head
        if make_head is None and not plan.is_end_to_end:
            raise ConfigError(
                "the plan has auxiliary losses: pass head=, a callable LossHead -> torch.nn.Module"
            )
        for place in plan.heads[:-1]:
            if place.after_layer in self._head_names:
                continue
            assert make_head is not None
            number = len(self.heads)
            built = build_head(make_head, number, place)
            self.heads[str(number)] = built if like is None else built.to(like.device, like.dtype)
            self._head_names[place.after_layer] = str(number)

    def _run_layers(self, hidden: Hidden, start: int, stop: int) -> Hidden:
        for layer in self.layers_in_order[start:stop]:
            hidden = layer(hidden)
        return hidden

    def _run(self, program: Program, micro_batches: Sequence[MicroBatch]) -> dict[int, Tensor]:
        return self.carry_out(program, self.stages, micro_batches)


class _Run:
    """One batch of ``program``: every stage runs until it waits for a message, until all are done."""

    def __init__(
        self, program: Program, stages: Sequence[StageWork], micro_batches: Sequence[MicroBatch]
    ) -> None:
        self.program = program
        self.stages = stages
        self.micro_batches = micro_batches
        self._messages: dict[Action, Any] = {}

    def losses(self) -> dict[int, Tensor]:
        """Does all the work; returns the mean of every loss."""
        for work in self.stages:
            work.begin_batch(len(self.micro_batches))
        programs = self.program.stages
        next_up = [0] * len(programs)
        while any(at < len(actions) for at, actions in zip(next_up, programs, strict=True)):
            before = list(next_up)
            for stage, actions in enumerate(programs):
                while next_up[stage] < len(actions) and self._run_action(actions[next_up[stage]]):
                    next_up[stage] += 1
            if next_up == before:
                raise ScheduleError("the stages wait for each other: this program cannot be carried out")
        losses: dict[int, Tensor] = {}
        for work in self.stages:
            losses |= work.mean_losses()
            work.begin_batch(1)
        return losses

    def _run_action(self, action: Action) -> bool:
        """Does ``action`` if what it needs is there; says whether it did."""
        work = self.stages[action.stage]
        if action.kind is Kind.LOAD:
            work.feed(action.micro_batch, *self.micro_batches[action.micro_batch])
        elif action.kind is Kind.SEND_FORWARD:
            self._messages[receive_of(action)] = work.output(action.micro_batch)
        elif action.kind in (Kind.SEND_GRADIENT, Kind.REDUCE, Kind.STEP) or action.kind in RECV_KINDS:
            pass  # gradients are passed on where they are made; there are no replicas, no optimizer
        else:
            needs = receives_needed(self.program.plan, action)
            if any(receive not in self._messages for receive in needs):
                return False
            for receive in needs:
                self._take(work, receive)
            self._pass_on(action, work.run(action))
        return True

    def _take(self, work: StageWork, receive: Action) -> None:
        message = self._messages[receive]
        if message is None:
            return  # an earlier action has taken it
        self._messages[receive] = None
        if receive.kind is Kind.RECV_FORWARD:
            work.feed(receive.micro_batch, *message)
        else:
            work.feed_gradient(receive.micro_batch, receive.losses, message)

    def _pass_on(self, action: Action, gradients: tuple[Tensor, ...] | None) -> None:
        if gradients is not None:
            send = send_of(self.program.plan, action)
            assert send is not None, "gradients are made to be sent"
            self._messages[receive_of(send)] = gradients
