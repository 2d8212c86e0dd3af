"""How an engine starts: time to the first batch, and what stays open, ours beside DeepSpeed's.

    python -m benchmarks.start_up --stages 2 5 32 --output start_up.json

The layers compute next to nothing. Times begin when all ranks have met. They are the slowest rank's, in the
fastest start; ranks share the machine's cores. Files are open ones, sockets included, on the rank that has
most: those of the process before it has an engine, mostly connections to all other ranks, and those that the
engine and a batch add. ``new_group`` is called on every rank of a job at once.
"""

import os
import time
from collections.abc import Sequence
from itertools import repeat
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from benchmarks import results
from benchmarks.overhead import next_to_nothing
from benchmarks.peers import DEEPSPEED, make_peer
from measuring.engines import run_ranks

ENGINES = (DEEPSPEED, "global", "window 2")
OPTIONS: results.Options = {
    "stages": ([2, 5, 32], "pipeline stages, a process each"),
    "micro_batches": (4, "of a batch"),
    "repeats": (3, "starts, of which the fastest counts"),
}


def measure(engine_name: str, num_micro_batches: int) -> dict[str, float]:
    """On a rank: seconds until the engine exists and until its first batch is done; files; groups."""
    work = next_to_nothing()
    dist.barrier()
    before, start = _num_open(), time.perf_counter()
    with patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
        engine = make_peer(engine_name, work)
    made = time.perf_counter()
    engine.set_train_batch_size(num_micro_batches)
    engine.train_batch(repeat(work.micro_batch))
    if hasattr(engine, "drain"):
        engine.drain()
    done = time.perf_counter()
    after = _num_open()
    dist.barrier()
    return {
        "seconds_to_engine": made - start,
        "seconds_to_first_batch": done - start,
        "new_group_calls": new_group.call_count,
        "files_before": before,
        "files_added": after - before,
    }


def _num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    rows: list[dict[str, Any]] = []
    for num_stages in args.stages:
        for engine in ENGINES:
            print(f"{num_stages} stages, {engine} ...", flush=True)
            starts = [
                run_ranks(measure, num_stages, engine_name=engine, num_micro_batches=args.micro_batches)
                for _ in range(args.repeats)
            ]
            most = [{key: max(of_rank[key] for of_rank in start) for key in start[0]} for start in starts]
            fastest = min(most, key=lambda start: start["seconds_to_first_batch"])
            rows.append({"stages": num_stages, "engine": engine, **fastest})
    results.publish("start_up", args, rows, argv)


if __name__ == "__main__":
    main()
