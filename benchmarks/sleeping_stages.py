"""A pipeline of sleeping stages, what its passes really take, and the batch time that follows from that."""

import statistics
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist

from ds_interlock import InterlockConfig
from ds_interlock.planning.forecast import play
from ds_interlock.profiling.layers import LayerCall, Stopwatch, loss_seconds, profile_layers
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.cost import CostModel
from measuring.engines import Workload
from measuring.sleeping import SleepingHead, sleeping_loss, sleeping_workload

LAYERS_PER_STAGE = 4
HEAD_SHARE = 0.3
"""What an auxiliary head takes for forward and backward, relative to the forward of a stage."""


def equal_bounds(num_stages: int) -> list[int]:
    """Where equal stages are cut."""
    return [LAYERS_PER_STAGE * stage for stage in range(num_stages + 1)]


def equal_stages(num_stages: int, seconds: float) -> Workload:
    """Stages that sleep ``seconds`` in the forward, for the input and for the weight gradient."""
    layer = [seconds / LAYERS_PER_STAGE] * 3
    return sleeping_workload([layer] * LAYERS_PER_STAGE * num_stages, lambda position: HEAD_SHARE * seconds)


def stage_costs(engine: Any, work: Workload, head_seconds: float) -> dict[str, float]:
    """Median seconds of this stage's work under one of our modes, in the terms of ``CostModel``.

    The passes are run by themselves, outside of the engine; the optimizer step is the engine's own. All
    ranks call it.
    """
    stopwatch, (hidden, labels) = Stopwatch(lambda: None), work.micro_batch
    head, layers = SleepingHead(head_seconds), torch.nn.Sequential(*engine.module.forward_funcs)
    dist.barrier()
    (stage,) = profile_layers([LayerCall("stage", layers, (hidden,))], stopwatch, None)
    return {
        "forward": stage.forward_seconds,
        "input_gradient": stage.input_gradient_seconds,
        "weight_gradient": stage.weight_gradient_seconds,
        "head": loss_seconds(lambda hidden: sleeping_loss(head(hidden), labels), hidden, stopwatch),
        "optimizer": _optimizer_seconds(engine, work),
    }


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
    bounds, setting = equal_bounds(len(costs)), InterlockConfig(**section)
    model = CostModel(**{name: [stage[name] for stage in costs] for name in costs[0]})
    return play(setting, model, bounds, num_micro_batches, num_batches=10)[1].batch_seconds
