"""Throughput of a pipeline of sleeping stages: DeepSpeed's engine and this one's modes, side by side.

    python -m benchmarks.pipeline_peers --stages 8 --micro_batches 1 4 8 --output pipeline_peers.json

Every stage sleeps ``--milliseconds`` in the forward, for the input gradient and for the weight
gradient; an auxiliary head sleeps 0.3 of that. Each engine runs in processes of its own, one after the
other: DeepSpeed makes some ten process groups an engine, and those of gloo poll for as long as their
process lives. Printed for each engine and number of micro-batches: the seconds a batch takes once the
pipeline is running, how many times faster than DeepSpeed's engine that is, what the simulator predicts,
and the distance to the floor (no bubble, no extra work: 3 t a micro-batch).

A sleeping stage takes a few per cent longer than it sleeps. So every process first times its own stage
alone, and the prediction is the simulator's at those costs: what is missing to 100 % is the engine's.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
DEEPSPEED = "DeepSpeed"
MODES: dict[str, dict[str, Any]] = {
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    "window 1.25": {"mode": "interlock", "window": 1.25},
    "window 1.25, 1 extra": {"mode": "interlock", "window": 1.25, "extra_in_flight": 1},
    "window 2": {"mode": "interlock", "window": 2},
}


def main() -> None:
    args = arguments()
    if args.engine:
        time_one(args)
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (DEEPSPEED, *MODES):
            print(f"{name} ...", flush=True)
            results[name] = run_job(name, args, Path(folder) / "result.json")
    rows = table_rows(args, results)
    print_table(args, rows)
    if args.output:
        written = {"machine": machine(), "arguments": vars(args), "rows": rows}
        args.output.write_text(json.dumps(written, indent=1, default=str))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, default=8, help="pipeline stages, a process each (%(default)s)")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 4], help="of a batch (1 4)")
    parser.add_argument("--milliseconds", type=float, default=40.0, help="one sleep of a stage (%(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="timed, after two that are not (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the results here, as JSON")
    parser.add_argument(
        "--engine", choices=(DEEPSPEED, *MODES), help="in the processes of a job: what to time"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_job(name: str, args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Times one engine in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", args.stages]
    job = [
        "--master_port",
        port,
        "--module",
        "benchmarks.pipeline_peers",
        "--engine",
        name,
        "--output",
        output,
    ]
    own = ["--milliseconds", args.milliseconds, "--batches", args.batches]
    words = [*launcher, *job, *own, "--micro_batches", *args.micro_batches]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: the job failed\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def time_one(args: argparse.Namespace) -> None:
    """What every process of a job does."""
    torch.set_num_threads(1)
    ds_interlock.init_distributed(dist_backend="gloo")
    stages, seconds = dist.get_world_size(), args.milliseconds / 1000
    if args.engine == DEEPSPEED:
        engine = deepspeed_engine(stages, seconds)
    else:
        engine = interlock_engine(stages, seconds, MODES[args.engine])
    costs: list[Any] = [None] * stages
    dist.all_gather_object(costs, stage_costs(engine, HEAD_SHARE * seconds))
    result = {"seconds": time_engine(engine, args), "costs": costs}
    if dist.get_rank() == 0:
        args.output.write_text(json.dumps(result))
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
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
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


def stage_costs(engine: Any, head_seconds: float, repeats: int = 5) -> dict[str, float]:
    """Median seconds of this stage's passes, run alone, in the terms of the cost model."""
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
        sleeping_loss(head(hidden), hidden.detach()).backward()

    dist.barrier()
    for _ in range(repeats):
        x = torch.ones(1, WIDTH, requires_grad=True)
        y = timed("forward", lambda x=x: layers(x))
        g = torch.ones_like(y)
        timed("input_gradient", lambda x=x, y=y, g=g: torch.autograd.grad(y, x, g, retain_graph=True))
        timed("backward", lambda y=y, g=g: torch.autograd.backward(y, g, inputs=parameters))
        timed("head", head_pass)
    engine.module.zero_grad()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    median["weight_gradient"] = median.pop("backward") - median["input_gradient"]
    return median


def predict(section: dict[str, Any], costs: list[dict[str, float]], micro_batches: int) -> float:
    """What the simulator says a batch takes."""
    interlock = ds_interlock.InterlockConfig(**section)
    plan = interlock.plan([LAYERS_PER_STAGE * k for k in range(len(costs) + 1)])
    model = CostModel(**{name: [stage[name] for stage in costs] for name in costs[0]})
    program = training_program(plan, micro_batches, extra_in_flight=interlock.extra_in_flight)
    return simulate(program, model, num_batches=10, streaming=not plan.is_end_to_end).batch_seconds


def table_rows(args: argparse.Namespace, results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for micro_batches in args.micro_batches:
        for name, result in results.items():
            measured = result["seconds"][str(micro_batches)]
            predicted = predict(MODES[name], result["costs"], micro_batches) if name in MODES else None
            rows.append(
                {
                    "engine": name,
                    "micro_batches": micro_batches,
                    "seconds": measured,
                    "times_deepspeed": results[DEEPSPEED]["seconds"][str(micro_batches)] / measured,
                    "predicted_seconds": predicted,
                    "share_of_predicted_speed": predicted / measured if predicted else None,
                    "times_floor": measured / (3 * args.milliseconds / 1000 * micro_batches),
                }
            )
    return rows


def print_table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{args.stages} stages, {args.milliseconds:g} ms each for forward, input and weight gradient; "
        f"head {HEAD_SHARE:g} of that\n"
    )
    print("| M | engine | s/batch | times DeepSpeed | predicted s | % of predicted speed | times floor |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        predicted, share = row["predicted_seconds"], row["share_of_predicted_speed"]
        cells = [
            f"{row['micro_batches']}",
            row["engine"],
            f"{row['seconds']:.3f}",
            f"{row['times_deepspeed']:.2f}",
            f"{predicted:.3f}" if predicted else "",
            f"{100 * share:.1f}" if share else "",
            f"{row['times_floor']:.2f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


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
