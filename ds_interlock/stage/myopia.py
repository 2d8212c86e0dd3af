"""The myopia meter: how far a stage's gradient points away from the global one.

For the same samples, weights and random numbers (dropout), stage by stage:

    plan in force    truncated gradient  g ─┐
                                            ├─► cosine(g, G)     1: the stage sees as far as backpropagation
    end to end       global gradient     G ─┘                    0: its window tells it nothing of the rest

Both are computed beside the training: no ``.grad``, no random state and no running statistics change.
Micro-batches are gone through one by one, so that a layer draws the same numbers under both plans. Here is
what is measured, and the meter of one process; ``myopia_meter.py`` is that of a pipeline.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.lower import Program, training_program
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.in_process import InProcessPipeline, MicroBatch
from ds_interlock.stage.work import Gradients, StageWork, floats, leaves, or_zeros


def gradient_cosines(net: InProcessPipeline, micro_batches: Iterable[MicroBatch]) -> list[float]:
    """The cosine between each stage's gradient under the plan in force and its global gradient.

    Args:
        net: Stays as it is: parameters, ``.grad``, buffers, plan and torch's random state.
        micro_batches: ``(inputs, labels)`` each; gradients are summed over them.

    Returns:
        One number for each stage, over the parameters of its layers: 1 if it sees as far as
        backpropagation, as the last stage always does; nan if one of the gradients is zero.
    """
    micro_batches = list(micro_batches)
    plans = (net.plan, GradientFlowPlan.end_to_end(stage_bounds=net.plan.stage_bounds))
    was_training = net.training
    net.train()
    try:
        truncated, whole = (_gradients(net, plan, micro_batches) for plan in plans)
    finally:
        net.train(was_training)
    return [cosine(gradient_products(some, others)) for some, others in zip(truncated, whole, strict=True)]


def _gradients(
    net: InProcessPipeline, plan: GradientFlowPlan, micro_batches: Sequence[MicroBatch]
) -> list[list[Tensor]]:
    """Every stage's gradient under ``plan``, a tensor a parameter."""
    stages = net.stage_works(plan, ProbeWork)
    program = probe_program(plan)
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    with unchanged_random_state(device), unchanged_buffers(net):
        for micro_batch in micro_batches:
            net.carry_out(program, stages, [micro_batch])
    return [work.gradients for work in stages]


def probe_program(plan: GradientFlowPlan) -> Program:
    """The program of one micro-batch that ends without an optimizer step."""
    program = training_program(plan, 1)
    without_end = (
        tuple(action for action in actions if action.kind not in (Kind.REDUCE, Kind.STEP))
        for actions in program.stages
    )
    return replace(program, stages=tuple(without_end))


class ProbeWork(StageWork):
    """The work of one stage, with gradients that go nowhere but into ``gradients``."""

    gradients: list[Tensor]
    """Of ``parameters``, one by one, summed since this was made; float32, or what is more precise."""

    def begin_batch(self, num_micro_batches: int) -> None:
        super().begin_batch(num_micro_batches)
        if not hasattr(self, "gradients"):
            self.gradients = [
                torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
                for parameter in self.parameters
            ]

    def _head(self, action: Action) -> None:
        entry = self._in_flight[action.micro_batch]
        (loss,) = action.losses
        head = self.plan.heads[loss]
        hidden = leaves(entry.hidden[head.after_layer])
        inputs = floats(hidden)
        # What a head draws must not change what the layers behind it draw: the other plan lacks this head.
        with unchanged_random_state(inputs[0].device):
            value = self._loss_at(loss, hidden, entry.labels) * head.weight
        found = torch.autograd.grad(value, inputs, allow_unused=True)
        entry.of_heads[loss] = tuple(map(or_zeros, found, inputs))

    def _weight_gradient(self, action: Action) -> None:
        self._walk_back(action, ())

    def _backward(self, action: Action) -> Gradients:
        return self._walk_back(action, floats(self._in_flight[action.micro_batch].inputs))

    def _walk_back(self, action: Action, inputs: tuple[Tensor, ...]) -> Gradients:
        """Adds to ``gradients``; returns those of ``inputs``."""
        entry = self._in_flight[action.micro_batch]
        outputs, cotangents = self._cotangents(entry, self.plan.trained_by[self.stage])
        more = self._pass_done(action)
        wanted = (*self.parameters, *inputs)
        if not outputs or not wanted:  # frozen
            return tuple(torch.zeros_like(tensor) for tensor in inputs)
        found = torch.autograd.grad(outputs, wanted, cotangents, retain_graph=more, allow_unused=True)
        for total, gradient in zip(self.gradients, found, strict=False):
            if gradient is not None:
                total += gradient
        return tuple(map(or_zeros, found[len(self.parameters) :], inputs))


def gradient_products(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """``<a, b>, <a, a>, <b, b>`` of two gradients, a tensor a parameter each: ``[3]``, float64."""
    device = some[0].device if some else None
    products = torch.zeros(3, dtype=torch.float64, device=device)
    for one, other in zip(some, others, strict=True):
        a, b = one.flatten().double(), other.flatten().double()
        products += torch.stack([a @ b, a @ a, b @ b])
    return products


def cosine(products: Tensor) -> float:
    """The cosine that ``gradient_products`` mean; nan if a gradient is zero."""
    both, one, other = products.tolist()
    return both / math.sqrt(one * other) if one > 0 and other > 0 else math.nan


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Puts torch's random state, the CPU's and the device's, back to what it was."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Puts all buffers, as the running statistics of batch norm, back to what they were."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
