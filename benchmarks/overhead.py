"""The engine's own time: stages that compute next to nothing, ours beside DeepSpeed's.

    python -m benchmarks.overhead --output overhead.json

Every stage is one parameter added to a vector of 16 numbers. What a batch takes is what the engine, the
messages and torch's own calls make of it: microseconds for each micro-batch, by the clock, and the
processor time of one rank, which counts when more ranks than cores share a machine. DeepSpeed's
engine does the work of global backpropagation; a window does more (heads, relays), which is counted in.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from benchmarks import results
from benchmarks.engines import DEEPSPEED, Workload, make_engine, seconds_of_a_batch
from benchmarks.ranks import run_ranks

ENGINES = (DEEPSPEED, "global", "local", "window 2")
LAYERS_PER_STAGE = 2
WIDTH = 16


class Shift(nn.Module):
    """The smallest layer that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[1, WIDTH] -> [1, WIDTH]."""
        return x + self.weight


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """The smallest loss that has a gradient."""
    return (outputs - labels).square().mean()


def empty_workload(num_stages: int) -> Workload:
    """A model of next to nothing."""
    num_layers = LAYERS_PER_STAGE * num_stages
    return Workload(
        layers=[LayerSpec(Shift) for _ in range(num_layers)],
        layer_seconds=[1.0] * num_layers,
        loss_fn=squared_error,
        micro_batch=(torch.ones(1, WIDTH), torch.zeros(1, WIDTH)),
        head=lambda place: Shift(),
    )


def measure(engine_name: str, num_batches: dict[int, int]) -> dict[int, dict[str, float]]:
    """On a rank: seconds of a batch, and processor time of this rank, by micro-batches of a batch."""
    work = empty_workload(dist.get_world_size())
    engine = make_engine(engine_name, work)
    found = {}
    for num_micro_batches, number in num_batches.items():
        seconds_of_a_batch(engine, work, num_micro_batches, number)  # warm caches
        before = time.process_time()
        wall = seconds_of_a_batch(engine, work, num_micro_batches, number)
        # The two batches that are not timed are part of what the processor did.
        processor = (time.process_time() - before) / (number + 2)
        found[num_micro_batches] = {"seconds": wall, "processor_seconds": processor}
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and returns the results."""
    args = _arguments(argv)
    rows = []
    for engine in ENGINES:
        print(f"{engine} ...", flush=True)
        batches = {m: max(5, args.batches // m) for m in args.micro_batches}
        by_rank = run_ranks(measure, args.stages, engine_name=engine, num_batches=batches)
        for m in args.micro_batches:
            rows.append(
                {
                    "engine": engine,
                    "num_micro_batches": m,
                    "microseconds": 1e6 / m * by_rank[0][m]["seconds"],
                    "processor_microseconds": 1e6 / m * max(rank[m]["processor_seconds"] for rank in by_rank),
                }
            )
    found = results.collect("overhead", args, rows)
    results.publish(found, args.output)
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, default=2, help="pipeline stages, a process each (%(default)s)")
    parser.add_argument(
        "--micro_batches", type=int, nargs="+", default=[1, 4, 16], help="of a batch (1 4 16)"
    )
    parser.add_argument(
        "--batches", type=int, default=200, help="to time at M = 1, fewer above (%(default)s)"
    )
    results.add_output(parser)
    return parser.parse_args(argv)


def table(found: dict[str, Any]) -> str:
    """Microseconds for each micro-batch, and how they compare with DeepSpeed's."""
    reference = {
        row["num_micro_batches"]: row["microseconds"] for row in found["rows"] if row["engine"] == DEEPSPEED
    }
    return results.markdown(
        ["M", "engine", "us/micro-batch", "of DeepSpeed's", "processor us/micro-batch"],
        [
            [
                m,
                row["engine"],
                round(row["microseconds"]),
                f"{row['microseconds'] / reference[m]:.0%}",
                round(row["processor_microseconds"]),
            ]
            for m in found["arguments"]["micro_batches"]
            for row in found["rows"]
            if row["num_micro_batches"] == m
        ],
    )


def draw(found: dict[str, Any]) -> Any:
    """Microseconds for each micro-batch over the number of micro-batches."""
    figure, axes = results.new_figure(1, f"An engine's own time, {found['arguments']['stages']} stages")
    for engine in dict.fromkeys(row["engine"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["engine"] == engine]
        x = [row["num_micro_batches"] for row in rows]
        axes[0, 0].plot(x, [row["microseconds"] for row in rows], marker="o", label=engine)
    axes[0, 0].set(xlabel="micro-batches a batch", ylabel="microseconds a micro-batch", ylim=(0, None))
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].legend()
    return figure


if __name__ == "__main__":
    main()
