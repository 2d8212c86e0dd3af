"""Throughput of a pipeline of sleeping stages: DeepSpeed's engine and this one's modes, in one run.

    deepspeed --num_gpus 8 benchmarks/pipeline_peers.py --micro_batches 1 4 8 --output pipeline_peers.json

Every stage sleeps ``--milliseconds`` in the forward, for the input gradient and for the weight
gradient; an auxiliary head sleeps 0.3 of that. Printed for each mode and number of micro-batches: the
seconds a batch takes once the pipeline is running, how many times faster than DeepSpeed's engine
that is, what the simulator predicts for it, and the floor (no bubble, no extra work: 3 t M).
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule

import ds_interlock
from benchmarks.sleeping import SleepingHead, SleepingLayer, sleeping_loss
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.lower import training_program
from ds_interlock.schedule.simulate import simulate

LAYERS_PER_STAGE = 4
WIDTH = 16
HEAD_SHARE = 0.3
MODES: dict[str, dict[str, Any]] = {
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    "window 1.25": {"mode": "interlock", "window": 1.25},
    "window 2": {"mode": "interlock", "window": 2},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--micro_batches", type=int, nargs="+", default=[1, 4], help="micro-batches of a batch"
    )
    parser.add_argument("--milliseconds", type=float, default=40.0, help="length of one sleep of a stage")
    parser.add_argument("--batches", type=int, default=8, help="batches timed, after two that are not")
    parser.add_argument("--output", type=Path, help="write the results here, as JSON")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    ds_interlock.init_distributed(dist_backend="gloo")
    stages, seconds = dist.get_world_size(), args.milliseconds / 1000
    timed = {("DeepSpeed", m): s for m, s in time_engine(deepspeed_engine(stages, seconds), args).items()}
    predicted = {}
    for name, section in MODES.items():
        engine = interlock_engine(stages, seconds, section)
        timed |= {(name, m): s for m, s in time_engine(engine, args).items()}
        predicted |= {(name, m): predict(engine, m, seconds) for m in args.micro_batches}
    if dist.get_rank() == 0:
        rows = table_rows(args, timed, predicted, seconds)
        print_table(stages, args.milliseconds, rows)
        if args.output:
            args.output.write_text(
                json.dumps(
                    {"machine": machine(), "arguments": vars(args), "rows": rows}, indent=1, default=str
                )
            )
    dist.barrier()


def layers(stages: int, seconds: float) -> list[LayerSpec]:
    return [
        LayerSpec(SleepingLayer, WIDTH, seconds / LAYERS_PER_STAGE) for _ in range(LAYERS_PER_STAGE * stages)
    ]


def config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        "steps_per_print": None,
    }


def pipeline(stages: int, seconds: float) -> dict[str, Any]:
    return {
        "layers": layers(stages, seconds),
        "loss_fn": sleeping_loss,
        "num_stages": stages,
        "partition_method": "uniform",
    }


def deepspeed_engine(stages: int, seconds: float) -> Any:
    return deepspeed.initialize(model=PipelineModule(**pipeline(stages, seconds)), config=config())[0]


def interlock_engine(stages: int, seconds: float, section: dict[str, Any]) -> Any:
    net = ds_interlock.InterlockPipelineModule(
        **pipeline(stages, seconds),
        interlock=ds_interlock.InterlockConfig(**section),
        head=lambda place: SleepingHead(HEAD_SHARE * seconds),
    )
    return ds_interlock.initialize(model=net, config=config() | {"interlock": section})[0]


def data() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        yield torch.ones(1, WIDTH), torch.zeros(1, WIDTH)


def time_engine(engine: Any, args: argparse.Namespace) -> dict[int, float]:
    """Seconds a batch takes on the slowest stage once the pipeline is running, by micro-batches."""
    result = {}
    for micro_batches in args.micro_batches:
        engine.set_train_batch_size(micro_batches)
        batches = data()
        dist.barrier()
        for _ in range(2):
            engine.train_batch(batches)
        start = time.perf_counter()
        for _ in range(args.batches):
            engine.train_batch(batches)
        elapsed = torch.tensor((time.perf_counter() - start) / args.batches)
        if hasattr(engine, "drain"):
            engine.drain()
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        result[micro_batches] = elapsed.item()
    return result


def predict(engine: Any, micro_batches: int, seconds: float) -> float:
    """What the simulator says a batch takes."""
    costs = CostModel(
        forward=seconds, input_gradient=seconds, weight_gradient=seconds, head=HEAD_SHARE * seconds
    )
    program = training_program(engine.plan, micro_batches)
    return simulate(program, costs, num_batches=10, streaming=engine.streaming).batch_seconds


def table_rows(
    args: argparse.Namespace,
    timed: dict[tuple[str, int], float],
    predicted: dict[tuple[str, int], float],
    seconds: float,
) -> list[dict[str, Any]]:
    return [
        {
            "mode": mode,
            "micro_batches": micro_batches,
            "seconds": measured,
            "times_deepspeed": timed["DeepSpeed", micro_batches] / measured,
            "predicted_seconds": predicted.get((mode, micro_batches)),
            "measured_over_predicted_speed": predicted.get((mode, micro_batches), measured) / measured,
            "times_floor": measured / (3 * seconds * micro_batches),
        }
        for (mode, micro_batches), measured in sorted(timed.items(), key=lambda item: item[0][1])
    ]


def print_table(stages: int, milliseconds: float, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{stages} stages, {milliseconds:g} ms each for forward, input and weight gradient; "
        f"head {HEAD_SHARE:g} of that"
    )
    print(
        f"{'M':>3}  {'mode':<12} {'s/batch':>8} {'x DeepSpeed':>12} {'predicted s':>12} "
        f"{'% of predicted':>15} {'x floor':>8}"
    )
    for row in rows:
        predicted = f"{row['predicted_seconds']:.3f}" if row["predicted_seconds"] else "-"
        share = f"{100 * row['measured_over_predicted_speed']:.1f}" if row["predicted_seconds"] else "-"
        print(
            f"{row['micro_batches']:>3}  {row['mode']:<12} {row['seconds']:>8.3f} "
            f"{row['times_deepspeed']:>11.2f}x {predicted:>12} {share:>15} {row['times_floor']:>8.2f}",
            flush=True,
        )


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "ds_interlock": ds_interlock.__version__,
    }


if __name__ == "__main__":
    main()
