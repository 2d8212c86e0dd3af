"""A pipeline of sleeping stages, what its passes really take, and the batch time that follows from that."""

import statistics
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec

from ds_interlock import InterlockConfig
from ds_interlock.planning.forecast import play
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.cost import CostModel
from measuring.engines import Workload
from measuring.sleeping import SleepingHead, SleepingLayer, sleeping_loss, use_exact_timers

LAYERS_PER_STAGE = 4
WIDTH = 16
HEAD_SHARE = 0.3
"""What an auxiliary head takes for forward and backward, relative to the forward of a stage."""


def sleeping_workload(num_stages: int, seconds: float) -> Workload:
    """Stages that sleep ``seconds`` in the forward, for the input and for the weight gradient."""
    use_exact_timers()
    of_layer, num_layers = seconds / LAYERS_PER_STAGE, LAYERS_PER_STAGE * num_stages
    return Workload(
        layers=[LayerSpec(SleepingLayer, WIDTH, of_layer, of_layer, of_layer)] * num_layers,
        layer_seconds=[of_layer] * num_layers,
        loss_fn=sleeping_loss,
        micro_batch=(torch.ones(1, WIDTH), torch.zeros(1, WIDTH)),
        head=lambda position: SleepingHead(HEAD_SHARE * seconds),
    )


def stage_costs(engine: Any, work: Workload, head_seconds: float) -> dict[str, float]:
    """Median seconds of this stage's work under one of our modes, in the terms of ``CostModel``.

    The passes are run by themselves, outside of the engine; the optimizer step is the engine's own. All
    ranks call it.
    """
    layers = torch.nn.Sequential(*engine.module.forward_funcs)
    parameters, head = list(layers.parameters()), SleepingHead(head_seconds)
    seconds: dict[str, list[float]] = {"forward": [], "input_gradient": [], "backward": [], "head": []}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name].append(time.perf_counter() - start)
        return result

    def head_pass() -> None:
        hidden = torch.ones(1, WIDTH, requires_grad=True)
        sleeping_loss(head(hidden), hidden.detach()).backward()  # type: ignore[no-untyped-call]

    dist.barrier()
    for _ in range(5):
        x = torch.ones(1, WIDTH, requires_grad=True)
        y = timed("forward", lambda x=x: layers(x))
        g = torch.ones_like(y)
        timed("input_gradient", lambda x=x, y=y, g=g: torch.autograd.grad(y, x, g, retain_graph=True))
        timed("backward", lambda y=y, g=g: torch.autograd.backward(y, g, inputs=parameters))
        timed("head", head_pass)
    engine.module.zero_grad()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    median["weight_gradient"] = median.pop("backward") - median["input_gradient"]
    return median | {"optimizer": _optimizer_seconds(engine, work)}


def _optimizer_seconds(engine: Any, work: Workload) -> float:
    engine.set_train_batch_size(1)
    engine.record_timeline()
    for _ in range(3):
        engine.train_batch(repeat(work.micro_batch))
    spans = engine.timeline()[dist.get_rank()]
    engine.drain()
    return statistics.median(span.end - span.start for span in spans if span.action.kind is Kind.STEP)


def predicted_seconds(
    section: dict[str, Any], costs: list[dict[str, float]], num_micro_batches: int
) -> float:
    """A batch of M micro-batches according to the simulator, from the ``stage_costs`` of each stage."""
    bounds = [LAYERS_PER_STAGE * stage for stage in range(len(costs) + 1)]
    model = CostModel(**{name: [stage[name] for stage in costs] for name in costs[0]})
    return play(InterlockConfig(**section), model, bounds, num_micro_batches, num_batches=10)[1].batch_seconds
