"""A plan in one process: all stages of a pipeline on one device, with the same numbers.

The program of every stage is carried out by the same ``StageWork`` as on a real pipeline; a message
is an entry in a dictionary. This is the research mode (one GPU, many stages) and the fast way to
test what gradients a plan gives. Parameter names are those of the pipeline: ``3.weight`` for layer
3, ``heads.0.…`` for the head of loss 0.

    net = InProcessPipeline(layers, loss_fn, GradientFlowPlan.n_wise(4, window=2), head=make_head)
    losses = net.accumulate_gradients(micro_batches)
    optimizer.step()
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_interlock.errors import ConfigError, ScheduleError
from ds_interlock.pipe.stage import Hidden, LossFn, StageWork
from ds_interlock.schedule.action import RECV_KINDS, Action, Kind
from ds_interlock.schedule.lower import (
    Program,
    evaluation_program,
    receive_of,
    receives_needed,
    send_of,
    training_program,
)
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead

MakeHead = Callable[[LossHead], nn.Module]
MicroBatch = tuple[Hidden, Any]


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


class InProcessPipeline(nn.Module):
    """All stages of a plan, trained in one process.

    Args:
        layers: The model's layers, built: modules or callables, each taking the last one's result.
        loss_fn: ``loss_fn(outputs, labels)``, a scalar.
        plan: The gradient flow; its last stage bound must be ``len(layers)``.
        head: Builds an auxiliary head from its ``LossHead``; not needed if the plan has none.

    Raises:
        ConfigError: If plan, layers and head do not fit together.
    """

    def __init__(
        self,
        layers: Iterable[Callable[[Any], Any]],
        loss_fn: LossFn | None,
        plan: GradientFlowPlan,
        head: MakeHead | None = None,
    ) -> None:
        super().__init__()
        self.layers_in_order = list(layers)
        self.plan = plan
        if len(self.layers_in_order) != plan.num_layers:
            raise ConfigError(f"the plan is for {plan.num_layers} layers, got {len(self.layers_in_order)}")
        if head is None and not plan.is_end_to_end:
            raise ConfigError(
                "the plan has auxiliary losses: pass head=, a callable LossHead -> torch.nn.Module"
            )
        for number, layer in enumerate(self.layers_in_order):
            if isinstance(layer, nn.Module):
                self.add_module(str(number), layer)
        self.heads = nn.ModuleDict()
        if head is not None:
            for loss, place in enumerate(plan.heads[:-1]):
                self.heads[str(loss)] = build_head(head, loss, place)
        self.stages = [self._stage_work(stage, loss_fn) for stage in range(plan.num_stages)]

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

    def _stage_work(self, stage: int, loss_fn: LossFn | None) -> StageWork:
        layers = [self.layers_in_order[number] for number in self.plan.layers(stage)]
        parameters = {
            id(parameter): parameter
            for layer in layers
            if isinstance(layer, nn.Module)
            for parameter in layer.parameters()
            if parameter.requires_grad
        }
        heads = {
            loss: self.heads[str(loss)] for loss in self.plan.losses_at(stage) if str(loss) in self.heads
        }
        return StageWork(self.plan, stage, self._run_layers, list(parameters.values()), heads, loss_fn)

    def _run_layers(self, hidden: Hidden, start: int, stop: int) -> Hidden:
        for layer in self.layers_in_order[start:stop]:
            hidden = layer(hidden)
        return hidden

    def _run(self, program: Program, micro_batches: Sequence[MicroBatch]) -> dict[int, Tensor]:
        """Lets every stage run until it waits for a message, until all are done."""
        for work in self.stages:
            work.begin_batch(len(micro_batches))
        self._messages: dict[Action, Any] = {}
        next_up = [0] * self.plan.num_stages
        while any(at < len(actions) for at, actions in zip(next_up, program.stages, strict=True)):
            before = list(next_up)
            for stage, actions in enumerate(program.stages):
                while next_up[stage] < len(actions) and self._run_action(
                    actions[next_up[stage]], micro_batches
                ):
                    next_up[stage] += 1
            if next_up == before:
                raise ScheduleError("the stages wait for each other: this program cannot be carried out")
        losses: dict[int, Tensor] = {}
        for work in self.stages:
            losses |= work.mean_losses()
            work.begin_batch(1)
        return losses

    def _run_action(self, action: Action, micro_batches: Sequence[MicroBatch]) -> bool:
        """Does ``action`` if what it needs is there; says whether it did."""
        work = self.stages[action.stage]
        if action.kind is Kind.LOAD:
            work.feed(action.micro_batch, *micro_batches[action.micro_batch])
        elif action.kind is Kind.SEND_FORWARD:
            self._messages[receive_of(action)] = work.output(action.micro_batch)
        elif action.kind in (Kind.SEND_GRADIENT, Kind.REDUCE, Kind.STEP) or action.kind in RECV_KINDS:
            pass  # gradients are passed on where they are made; there are no replicas, no optimizer
        else:
            needs = receives_needed(self.plan, action)
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
            send = send_of(self.plan, action)
            assert send is not None, "gradients are made to be sent"
            self._messages[receive_of(send)] = gradients
