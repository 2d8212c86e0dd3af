"""The same training over NCCL and over gloo, with large messages: the same weights, and how fast?

    python -m benchmarks.transports --device cuda --transports gloo nccl --output transports.json

Each stage is a process; GPUs are shared where they are fewer. With one queue for each direction of the whole
pipeline, all windows but the first three below stood still under NCCL. Small messages can end on NCCL before
anybody receives them: these are megabytes. NCCL takes several ranks of one GPU from version 2.30 on, with
NCCL_MULTI_RANK_GPU_ENABLE=1.
"""

import hashlib
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from benchmarks import results
from ds_interlock.transport.local_ranks import RankError
from measuring.engines import Workload, make_engine, run_ranks

LIMIT_SECONDS = 80.0
"""For all cases of a transport on as many stages, the start of the processes included."""
NUM_CLASSES = 32
BLOCKS_PER_STAGE = 4
CASES: tuple[tuple[int, dict[str, Any]], ...] = (
    (4, {"mode": "global"}),
    (4, {"mode": "local"}),
    (4, {"mode": "interlock", "window": 2}),
    (4, {"mode": "interlock", "window": 2, "extra_in_flight": 1}),
    (4, {"mode": "interlock", "window": 3}),
    (4, {"mode": "interlock", "window": 1.25, "extra_in_flight": 1}),
    (2, {"mode": "interlock", "window": 1.25, "extra_in_flight": 4}),
)
"""Stages, and the ``"interlock"`` section."""
OPTIONS: results.Options = {
    "device": ("cpu", "cpu or cuda"),
    "transports": (["gloo"], "the first one is what the others are compared with", ("gloo", "nccl")),
    "micro_batches": (8, "of a batch"),
    "rows": (2048, "of a micro-batch"),
    "width": (1024, "of the hidden state, float32"),
    "batches": (5, "timed, after one that is not"),
}


class Block(nn.Module):
    """A residual block that begins with a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes; exit status 1 if a case failed, or has other weights than the first time."""
    args = results.parse(__doc__, OPTIONS, argv)
    rows: list[results.Row] = []
    for transport in args.transports:
        for num_stages in sorted({stages for stages, _ in CASES}, reverse=True):
            print(f"{transport}, {num_stages} stages ...", flush=True)
            rows += _rows_of_job(transport, num_stages, args)
    expected = {_case(row): row.get("weights") for row in rows if row["transport"] == args.transports[0]}
    for row in rows:
        row["same_weights"] = row.get("weights") is not None and row["weights"] == expected[_case(row)]
    results.publish("transports", args, rows, argv)
    if not all(row["same_weights"] for row in rows):
        sys.exit(1)


def _case(row: results.Row) -> tuple[int, str]:
    return row["stages"], row["mode"]


def _rows_of_job(transport: str, num_stages: int, args: Namespace) -> list[results.Row]:
    sections = [section for stages, section in CASES if stages == num_stages]
    about = [
        {"stages": num_stages, "mode": ", ".join(map(str, section.values())), "transport": transport}
        for section in sections
    ]
    try:
        how = {"device": args.device, "backend": transport, "timeout_seconds": LIMIT_SECONDS}
        by_rank = run_ranks(train_all, num_stages, **how, sections=sections, args=args)
    except (RankError, TimeoutError) as error:
        return [{**row, "error": str(error)} for row in about]
    return [
        {
            **row,
            "message_bytes": 4 * args.rows * args.width,
            "seconds": max(seconds for seconds, _ in of_case),
            "weights": hashlib.sha256("".join(weights for _, weights in of_case).encode()).hexdigest(),
        }
        for row, of_case in zip(about, zip(*by_rank, strict=True), strict=True)
    ]


def train_all(sections: Sequence[dict[str, Any]], args: Namespace) -> list[tuple[float, str]]:
    """On a rank: for each section the median seconds of a batch, and a checksum of the stage's weights."""
    return [_train(section, args) for section in sections]


def _train(section: dict[str, Any], args: Namespace) -> tuple[float, str]:
    num_stages = dist.get_world_size()
    num_blocks = num_stages * BLOCKS_PER_STAGE - 1
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(args.rows, args.width, generator=generator)
    work = Workload(
        layers=[
            *(LayerSpec(Block, args.width) for _ in range(num_blocks)),
            LayerSpec(nn.Linear, args.width, NUM_CLASSES),
        ],
        layer_seconds=[1.0] * (num_blocks + 1),
        loss_fn=nn.functional.cross_entropy,
        micro_batch=(inputs, torch.randint(NUM_CLASSES, (args.rows,), generator=generator)),
        head=lambda _: nn.Linear(args.width, NUM_CLASSES),
    )
    engine = make_engine(work, {**section, "transport": _transport(args.device), "timeout_seconds": 60})
    engine.set_train_batch_size(args.micro_batches * args.rows)
    data, seconds = repeat(work.micro_batch), []
    for _ in range(args.batches + 1):
        engine.drain()
        start = time.perf_counter()
        engine.train_batch(data)
        engine.drain()
        get_accelerator().synchronize()
        seconds.append(time.perf_counter() - start)
    weights = hashlib.sha256()
    for parameter in engine.module.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    engine.destroy()
    return statistics.median(seconds[1:]), weights.hexdigest()


def _transport(device: str) -> str:
    return "gloo" if device == "cpu" or dist.get_backend() == "gloo" else "auto"


if __name__ == "__main__":
    main()
