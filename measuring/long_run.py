"""Thousands of streaming batches in many processes: is each reported loss its batch's, and is memory flat?

    python -m measuring.long_run --batches 10000 --output docs/long_run.json

Local learning, so that each stage runs as far ahead as it may. Every loss that a stage has reported, for each
batch, is compared with that of the same batch in one process. Losses differ from batch to batch by far more
than by rounding. The memory of each process is read after a tenth of the batches, and at the end.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

import ds_interlock
from ds_interlock import GradientFlowPlan
from ds_interlock.files import replace_text
from ds_interlock.schedule.plan import LossHead, loss_name
from ds_interlock.stage.in_process import InProcessPipeline
from ds_interlock.transport.local_ranks import run_local_ranks
from measuring.command import command_parser
from measuring.results import machine, versions

WIDTH, ROWS, NUM_MICRO_BATCHES = 8, 2, 2
LEARNING_RATE = 1e-3
MOST_GROWTH = 0.02
MOST_DIFFERENCE = 1e-3
"""Relative: rounding, after thousands of updates."""

Losses = dict[str, float]


class _Events:
    """In place of DeepSpeed's monitor: what stages report, by name and samples."""

    enabled = True

    def __init__(self) -> None:
        self.values: Losses = {}

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        self.values |= {f"{name} {samples}": value for name, value, samples in events}


class _Layer(nn.Sequential):
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def _head(position: LossHead) -> nn.Module:
    torch.manual_seed(1000 + position.after_layer)
    return nn.Linear(WIDTH, WIDTH)


def _loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, labels)


def _data(num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels of another size for each batch, so that the losses of two batches are never alike."""
    generator = torch.Generator().manual_seed(0)
    for number in range(num_batches * NUM_MICRO_BATCHES):
        size = 1 + number // NUM_MICRO_BATCHES * 7 % 13
        inputs, labels = torch.randn(2, ROWS, WIDTH, generator=generator)
        yield inputs, size * labels


def run_rank(num_batches: int) -> tuple[int, int, float, Losses]:
    """On a rank: memory in bytes after a tenth of the batches and at the end, seconds, reports collected."""
    ds_interlock.init_distributed(dist_backend="gloo")
    num_stages = torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "steps_per_print": None,
        "interlock": {"mode": "local"},
    }
    net = ds_interlock.InterlockPipelineModule(
        layers=[LayerSpec(_Layer, seed) for seed in range(num_stages)],
        loss_fn=_loss_fn,
        num_stages=num_stages,
        partition_method="uniform",
        head=_head,
    )
    engine, *_ = ds_interlock.initialize(model=net, config=config)
    engine.monitor = events = _Events()
    data, process, start = _data(num_batches), psutil.Process(), time.perf_counter()
    early = 0
    for batch in range(num_batches):
        engine.train_batch(data)
        if batch == num_batches // 10:
            early = process.memory_info().rss
    engine.drain()
    seconds = time.perf_counter() - start
    return early, process.memory_info().rss, seconds, events.values


def one_process(num_stages: int, num_batches: int) -> Losses:
    """The loss of each stage in each batch, by the names that stages report them under."""
    plan = GradientFlowPlan.local(stage_bounds=list(range(num_stages + 1)))
    net = InProcessPipeline([_Layer(seed) for seed in range(num_stages)], _loss_fn, plan, _head)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    data, losses = _data(num_batches), {}
    for batch in range(1, num_batches + 1):
        of_batch = net.accumulate_gradients([next(data) for _ in range(NUM_MICRO_BATCHES)])
        optimizer.step()
        optimizer.zero_grad()
        samples = batch * NUM_MICRO_BATCHES * ROWS
        for loss, value in of_batch.items():
            name = f"Train/stage_{plan.heads[loss].stage}/{loss_name(plan, loss)} {samples}"
            losses[name] = float(value)
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and compares; 1 if something was not as it should be."""
    parser = command_parser(__doc__)
    parser.add_argument("--batches", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--stages", type=int, default=8, help="processes (%(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ranks: list[Any] = run_local_ranks(partial(run_rank, args.batches), args.stages)
    torch.set_num_threads(1)
    result = {**compare(one_process(args.stages, args.batches), ranks), **vars(args)}
    del result["output"]
    if args.output:
        about = {"machine": machine(), "versions": versions()}
        replace_text(args.output, json.dumps({**about, **result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(bool(result["problems"]))


def compare(expected: Losses, ranks: Sequence[tuple[int, int, float, Losses]]) -> dict[str, Any]:
    """Losses that were reported and their largest relative difference, growth of memory, problems."""
    reported = ranks[0][3]
    differences = {
        name: abs(reported[name] - value) / abs(value) for name, value in expected.items() if name in reported
    }
    growth = [last / early - 1 for early, last, _, _ in ranks]
    wrong = [name for name, difference in differences.items() if difference > MOST_DIFFERENCE]
    problems = [f"{len(expected) - len(differences)} losses were never reported"]
    problems = problems if len(differences) < len(expected) else []
    problems += [f"{len(wrong)} losses are not their batch's, {wrong[0]} the first"] if wrong else []
    problems += [f"memory of rank {r} grew by {g:.1%}" for r, g in enumerate(growth) if g > MOST_GROWTH]
    return {
        "losses_reported": len(differences),
        "largest_relative_difference": max(differences.values()),
        "largest_growth_of_memory": max(growth),
        "seconds": ranks[0][2],
        "problems": problems,
    }


if __name__ == "__main__":
    sys.exit(main())
