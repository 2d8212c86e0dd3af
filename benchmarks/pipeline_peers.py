"""Throughput of a pipeline of sleeping stages: this package's modes beside DeepSpeed's engine and torch's.

    python -m benchmarks.pipeline_peers --output pipeline_peers.json

Every stage sleeps ``--milliseconds`` in the forward, for the input gradient and for the weight
gradient; an auxiliary head sleeps 0.3 of that. Each engine runs in processes of its own. For each engine,
number of stages K and number of micro-batches M: the seconds a batch takes once the pipeline is running,
how many times faster than DeepSpeed's engine that is, what the simulator predicts, and the distance to the
floor (no bubble, no extra work: 3 t per micro-batch).

A sleeping stage takes a few per cent longer than it sleeps. So every process first times its own stage
alone, and the prediction is the simulator's at those costs: what is missing to 100 % is the engine's.
"""

import statistics
from argparse import Namespace
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import results
from benchmarks.peers import DEEPSPEED, MODES, compare, make_peer, time_batches
from ds_interlock import InterlockConfig
from ds_interlock.planning.forecast import play
from ds_interlock.profiling.layers import LayerCall, Stopwatch, loss_seconds, profile_layers
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.cost import CostModel
from measuring.engines import Workload, run_ranks
from measuring.sleeping import HEAD_SHARE, SleepingHead, equal_bounds, equal_stages
from measuring.torch_pipeline import TORCH_SCHEDULES

ENGINES = (*TORCH_SCHEDULES, "global", "local", "window 1.25", "window 1.25, 1 extra", "window 2")
OPTIONS: results.Options = {
    "stages": ([2, 4, 8], "pipeline stages, a process each"),
    "micro_batches": ([1, 2, 4, 8, 16], "of a batch"),
    "engines": (list(ENGINES), "measured beside DeepSpeed's", ENGINES),
    "milliseconds": (40.0, "one sleep of a stage"),
    "seconds": (2.0, "work of a stage for each figure, as far as 2 to 8 batches make it"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    rows = [row for num_stages in args.stages for row in rows_of(num_stages, args)]
    results.publish("pipeline_peers", args, rows, argv)


def rows_of(num_stages: int, args: Namespace) -> list[results.Row]:
    """The measurements of all engines with one number of stages."""
    floor = {m: 3 * args.milliseconds / 1000 * m for m in args.micro_batches}
    num_batches = {m: min(max(round(args.seconds / seconds), 2), 8) for m, seconds in floor.items()}
    seconds, costs = {}, {}
    for engine in (DEEPSPEED, *args.engines):
        print(f"{num_stages} stages: {engine} ...", flush=True)
        how = {"engine_name": engine, "seconds": args.milliseconds / 1000, "num_batches": num_batches}
        by_rank = run_ranks(measure, num_stages, **how)
        seconds[engine] = by_rank[0][0]
        costs[engine] = [of_rank for _, of_rank in by_rank]
    rows = compare(seconds, floor, lambda engine, m: predicted_seconds(engine, costs[engine], m))
    return [{"stages": num_stages, **row} for row in rows]


def measure(
    engine_name: str, seconds: float, num_batches: dict[int, int]
) -> tuple[dict[int, float | str], dict[str, float] | None]:
    """On every rank of a job: ``time_batches`` of an engine, and this stage's costs under our modes."""
    work = equal_stages(seconds, [1.0] * dist.get_world_size())
    engine = make_peer(engine_name, work)
    costs = stage_costs(engine, work, HEAD_SHARE * seconds) if engine_name in MODES else None
    return time_batches(engine, work, num_batches), costs


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
        "head": loss_seconds(lambda hidden: head.loss(hidden, labels, None), hidden, stopwatch),
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


def predicted_seconds(mode: str, costs: list[dict[str, float]], num_micro_batches: int) -> float:
    """A batch of M micro-batches according to the simulator, from the ``stage_costs`` of each stage."""
    bounds, setting = equal_bounds(len(costs)), InterlockConfig(**MODES[mode])
    model = CostModel(**{name: [stage[name] for stage in costs] for name in costs[0]})
    return play(setting, model, bounds, num_micro_batches, num_batches=10)[1].batch_seconds


if __name__ == "__main__":
    main()
