"""Thousands of streaming batches in many processes: is each reported loss its batch's, and is memory flat?

    python -m measuring.long_run --batches 10000 --output docs/long_run.json

Local learning, so that each stage runs as far ahead as it may. Every loss that a stage has reported, for each
batch, is compared with that of the same batch in one process. Losses differ from batch to batch by far more
than by rounding. The memory of each process is read after a tenth of the batches, and at the end.

Three shorter runs follow, in which something is slow: the last stage, the reader of the reports, the data. It
must slow the others, rather than fill memory, and change no loss. Waiting for data must be visible as that.
"""

import json
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal

import psutil
import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

import ds_interlock
from ds_interlock import GradientFlowPlan
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.lower import RECEIVE_AHEAD
from ds_interlock.schedule.plan import LossHead, loss_name
from ds_interlock.schedule.simulate import SEND_AHEAD
from ds_interlock.stage.in_process import InProcessPipeline
from ds_interlock.transport.local_ranks import run_local_ranks
from measuring.command import command_parser
from measuring.results import write_results

WIDTH, ROWS, NUM_MICRO_BATCHES = 8, 2, 2
LEARNING_RATE = 1e-3
MOST_GROWTH = 0.02
MOST_DIFFERENCE = 1e-3
"""Relative: rounding, after thousands of updates."""
SLOW_SECONDS = {"last stage": 0.02, "reader": 0.005, "data": 0.02}
"""How long it takes for a micro-batch, for the report of a stage, for a micro-batch."""
STALL_SECONDS = 3.0
"""How long the slow reader does nothing at all, once."""
RECORDED_BATCHES = 20
"""The last ones are recorded, where waiting for data must be visible; a recording takes memory."""

Losses = dict[str, float]
Slow = Literal["last stage", "reader", "data", None]


@dataclass
class Rank:
    """What a rank has to say: bytes after a tenth of the batches and at the end, and so on."""

    early_bytes: int
    last_bytes: int
    ends: list[float]
    """When each batch ended here, in seconds."""
    reports: Losses
    data_waits: list[float]
    """How long this stage waited for each of the last micro-batches of data, in seconds."""
    data_share: float
    """Which part of its time that was."""


@dataclass
class _Events:
    """In place of DeepSpeed's monitor: what stages report goes to a file, as memory must stay flat."""

    is_slow: bool
    stalls_at: int
    file: IO[str]
    enabled: bool = True

    def write_events(self, events: Sequence[tuple[str, float, int]]) -> None:
        stalls = self.stalls_at in [samples for _, _, samples in events]
        if self.is_slow:
            time.sleep(STALL_SECONDS if stalls else SLOW_SECONDS["reader"])
            self.stalls_at = 0 if stalls else self.stalls_at
        self.file.writelines(f"{name} {samples} {value!r}\n" for name, value, samples in events)

    def values(self) -> Losses:
        """All of them, by name and samples."""
        self.file.seek(0)
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in self.file)}


class _Layer(nn.Sequential):
    def __init__(self, seed: int, slow_seconds: float = 0.0) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.slow_seconds = slow_seconds

    def forward(self, hidden: Tensor) -> Tensor:
        time.sleep(self.slow_seconds)
        return super().forward(hidden)


def _head(position: LossHead) -> nn.Module:
    torch.manual_seed(1000 + position.after_layer)
    return nn.Linear(WIDTH, WIDTH)


def _loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, labels)


def _data(num_batches: int, slow_seconds: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels of another size for each batch, so that the losses of two batches are never alike."""
    generator = torch.Generator().manual_seed(0)
    for number in range(num_batches * NUM_MICRO_BATCHES):
        size = 1 + number // NUM_MICRO_BATCHES * 7 % 13
        inputs, labels = torch.randn(2, ROWS, WIDTH, generator=generator)
        time.sleep(slow_seconds)
        yield inputs, size * labels


def run_rank(num_batches: int, slow: Slow = None) -> Rank:
    """On a rank: trains, with one thing that is slow."""
    ds_interlock.init_distributed(dist_backend="gloo")
    engine = _engine(torch.distributed.get_world_size(), slow)
    data = _data(num_batches, SLOW_SECONDS["data"] if slow == "data" else 0.0)
    process, ends, early = psutil.Process(), list[float](), 0
    with TemporaryFile("w+") as file:
        stalls_at = num_batches // 2 * NUM_MICRO_BATCHES * ROWS
        engine.monitor = events = _Events(slow == "reader", stalls_at, file)
        for batch in range(num_batches):
            if slow == "data" and batch == num_batches - RECORDED_BATCHES:
                engine.record_timeline()
            engine.train_batch(data)
            ends.append(time.time())
            if batch == num_batches // 10:
                early = process.memory_info().rss
        row = engine.timeline()[engine.stage_id]
        engine.drain()
        waits = [span.end - span.start for span in row if span.action.kind is Kind.LOAD]
        share = sum(waits) / (row[-1].end - row[0].start) if row else 0.0
        return Rank(early, process.memory_info().rss, ends, events.values(), waits, share)


def _engine(num_stages: int, slow: Slow) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "steps_per_print": None,
        "interlock": {"mode": "local"},
    }
    seconds = dict.fromkeys(range(num_stages), 0.0)
    seconds[num_stages - 1] = SLOW_SECONDS["last stage"] if slow == "last stage" else 0.0
    net = ds_interlock.InterlockPipelineModule(
        layers=[LayerSpec(_Layer, *layer) for layer in seconds.items()],
        loss_fn=_loss_fn,
        num_stages=num_stages,
        partition_method="uniform",
        head=_head,
    )
    engine, *_ = ds_interlock.initialize(model=net, config=config)
    return engine


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


def run(num_stages: int, num_batches: int, slow: Slow = None) -> dict[str, Any]:
    """Trains in ``num_stages`` processes and in one: what there is to say, and problems."""
    ranks: list[Rank] = run_local_ranks(partial(run_rank, num_batches, slow), num_stages)
    expected = one_process(num_stages, num_batches)
    result = compare(expected, ranks)
    ahead = batches_ahead(ranks[0].ends, ranks[-1].ends)
    most_ahead = 1 + (num_stages - 1) * (RECEIVE_AHEAD + SEND_AHEAD + 1) / NUM_MICRO_BATCHES
    if ahead > most_ahead:
        result["problems"].append(f"stage 0 was {ahead} batches ahead, expected {most_ahead:g} at most")
    result |= {"batches": num_batches, "stages": num_stages, "most_batches_ahead": ahead}
    if slow == "data":
        result["share_of_waiting_for_data"] = round(ranks[0].data_share, 3)
        shortest = min(ranks[0].data_waits, default=0.0)
        seen = shortest >= SLOW_SECONDS["data"]
        result["problems"] += [] if seen else [f"once data seemed to take no more than {shortest} s"]
    return result


def batches_ahead(first: Sequence[float], last: Sequence[float]) -> int:
    """The most batches that one stage had ended when another one had not, given when each ended them."""
    return max(bisect_right(first, end) - number for number, end in enumerate(last))


def compare(expected: Losses, ranks: Sequence[Rank]) -> dict[str, Any]:
    """Losses that were reported and their largest relative difference, growth of memory, problems."""
    reported = ranks[0].reports
    differences = {
        name: abs(reported[name] - value) / abs(value) for name, value in expected.items() if name in reported
    }
    growth = [rank.last_bytes / rank.early_bytes - 1 for rank in ranks]
    wrong = [name for name, difference in differences.items() if difference > MOST_DIFFERENCE]
    problems = [f"{len(expected) - len(differences)} losses were never reported"]
    problems = problems if len(differences) < len(expected) else []
    problems += [f"{len(wrong)} losses are not their batch's, {wrong[0]} the first"] if wrong else []
    problems += [f"memory of rank {r} grew by {g:.1%}" for r, g in enumerate(growth) if g > MOST_GROWTH]
    return {
        "losses_reported": len(differences),
        "largest_relative_difference": max(differences.values()),
        "largest_growth_of_memory": max(growth),
        "seconds": ranks[0].ends[-1] - ranks[0].ends[0],
        "problems": problems,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and compares; 1 if something was not as it should be."""
    parser = command_parser(__doc__)
    parser.add_argument("--batches", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--slow_batches", type=int, default=400, help="of each shorter run (%(default)s)")
    parser.add_argument("--stages", type=int, default=8, help="processes (%(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, tuple[int, Slow]] = {"nothing slow": (args.batches, None)}
    runs |= {f"slow {part}": (args.slow_batches, part) for part in ("last stage", "reader", "data")}
    for name, (num_batches, slow) in runs.items():
        results[name] = run(args.stages, num_batches, slow)
        print(name, json.dumps(results[name], indent=1), flush=True)
        if args.output:
            write_results(args.output, runs=results)
    return int(any(result["problems"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
