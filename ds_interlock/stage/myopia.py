"""The myopia meter: how far a stage's gradient points away from the global one.

For the same samples, weights and random numbers (dropout), stage by stage:

    plan in force    truncated gradient  g ─┐
                                            ├─► cosine(g, G)     1: the stage sees as far as backpropagation
    end to end       global gradient     G ─┘                    0: its window shows nothing of it

Both are computed beside the training: no ``.grad``, no random state and no running statistics change.
Micro-batches run one by one, so that a layer draws the same numbers under both plans.
Here is the meter of one process; ``engine/myopia.py`` is that of a pipeline.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.program import training_program
from ds_interlock.stage.backward import Backward, HeadLoss, LayerPass
from ds_interlock.stage.hidden import Gradients, Hidden, floats, leaves
from ds_interlock.stage.in_process import InProcessPipeline, MicroBatch, run_program
from ds_interlock.stage.recomputation import BuffersKept


def gradient_cosines(net: InProcessPipeline, micro_batches: Iterable[MicroBatch]) -> list[float]:
    """The cosine between each stage's gradient under the plan in force and its global gradient.

    Args:
        net: Stays as it is, with ``.grad``, buffers and torch's random state.
        micro_batches: ``(inputs, labels)`` each; gradients are summed over them.

    Returns:
        One number for each stage, 1 for the last; nan if one of the gradients is zero.
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
    """Every stage's gradient under ``plan``, one tensor per parameter."""
    probes = [Probe(net.layer_parameters(stage)) for stage in range(plan.num_stages)]
    stages = net.stage_works(plan, probes)
    program = probe_program(plan)
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    with unchanged_random_state(device), BuffersKept([net]):
        for micro_batch in micro_batches:
            run_program(program, stages, [micro_batch])
    return [probe.gradients for probe in probes]


def probe_program(plan: GradientFlowPlan) -> Program:
    """The program of one micro-batch that ends without an optimizer step."""
    program = training_program(plan, 1)
    end = (Kind.REDUCE, Kind.STEP)
    stages = tuple(tuple(action for action in row if action.kind not in end) for row in program.stages)
    return replace(program, stages=stages)


class Probe(Backward):
    """Where the gradients of a stage go in a measurement: into ``gradients``, and nowhere else."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.gradients = [
            torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter in parameters
        ]

    def head(self, loss: HeadLoss, hidden: Hidden) -> Gradients:
        """As in training, but the head's own parameters get none."""
        hidden = leaves(hidden)
        inputs = floats(hidden)
        # What a head draws must not change what later layers draw: the other plan lacks this head.
        with unchanged_random_state(inputs[0].device):
            value = loss.scaled(hidden)
        return torch.autograd.grad(value, inputs, materialize_grads=True)

    def walk_back(self, layers: LayerPass, inputs: tuple[Tensor, ...] | None = None) -> Gradients:
        """Adds to ``gradients``; returns those of ``inputs``."""
        outputs, cotangents, parameters, retain_graph = layers
        inputs = inputs or ()
        if not outputs or not (*parameters, *inputs):  # frozen
            return tuple(torch.zeros_like(tensor) for tensor in inputs)
        gradients = torch.autograd.grad(
            outputs, (*parameters, *inputs), cotangents, retain_graph=retain_graph, materialize_grads=True
        )
        for total, gradient in zip(self.gradients, gradients, strict=False):
            total += gradient
        return gradients[len(parameters) :]


def gradient_products(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """``<a, b>, <a, a>, <b, b>`` of two gradients, one tensor per parameter: ``[3]``, float64."""
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
