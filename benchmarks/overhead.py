"""The engine's own time: stages that compute next to nothing, ours beside DeepSpeed's.

    python -m benchmarks.overhead --output overhead.json

Every layer is one parameter added to a vector of 16 numbers. The time of a batch is that of the engine, the
messages and torch's own calls: microseconds for each micro-batch. A window does more than global
backpropagation (heads, relays), which is counted in.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from benchmarks import results
from benchmarks.peers import DEEPSPEED, make_peer, time_batches
from measuring.engines import Workload, run_ranks
from measuring.sleeping import sleeping_loss

ENGINES = (DEEPSPEED, "global", "local", "window 2")
LAYERS_PER_STAGE = 2
WIDTH = 16
OPTIONS: results.Options = {
    "stages": (2, "pipeline stages, a process each"),
    "micro_batches": ([1, 4, 16], "of a batch"),
    "batches": (200, "to time at M = 1, fewer above"),
}


class Shift(nn.Module):
    """The smallest layer that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[1, WIDTH] -> [1, WIDTH]."""
        return x + self.weight


def next_to_nothing() -> Workload:
    """Two such layers for each rank of the job, and heads of one."""
    num_layers = LAYERS_PER_STAGE * dist.get_world_size()
    return Workload(
        layers=[LayerSpec(Shift)] * num_layers,
        layer_seconds=[1.0] * num_layers,
        loss_fn=sleeping_loss,
        micro_batch=(torch.ones(1, WIDTH), torch.zeros(1, WIDTH)),
        head=lambda position: Shift(),
    )


def measure(engine_name: str, num_batches: dict[int, int]) -> dict[int, float | str]:
    """On a rank: seconds of a batch, by micro-batches per batch."""
    work = next_to_nothing()
    engine = make_peer(engine_name, work)
    time_batches(engine, work, num_batches)  # warm caches
    return time_batches(engine, work, num_batches)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    batches = {m: max(5, args.batches // m) for m in args.micro_batches}
    rows = []
    for engine in ENGINES:
        print(f"{engine} ...", flush=True)
        seconds = run_ranks(measure, args.stages, engine_name=engine, num_batches=batches)[0]
        rows += [
            {"engine": engine, "num_micro_batches": m, "microseconds": 1e6 / m * seconds[m]} for m in batches
        ]
    results.publish("overhead", args, rows, argv)


if __name__ == "__main__":
    main()
