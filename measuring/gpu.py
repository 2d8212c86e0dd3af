"""Everything that wants a GPU, one after the other: on as many as there are, or on the CPU, to see it run.

    python -m measuring.gpu --output_dir docs/gpu     # make gpu
    python -m measuring.gpu --device cpu --output_dir runs/gpu

Gradients, streaming and windows are verified on the device; the same training over gloo, and over NCCL where
it can be, must give the same weights; then costs of heads, all modes on one device, and a profile for the
planner. Where there are fewer GPUs than stages, they share them. Each step is a command of its own, with a
time limit. ``steps.json`` has the command, the outcome and the end of the output of each, after every step.
"""

import ctypes
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_interlock.files import replace_text
from measuring.command import command_parser
from measuring.results import markdown, write_results

NUM_STAGES = 4
SHARES_A_GPU = (2, 30)
"""The first version of NCCL that takes several ranks of one GPU."""
_SECTIONS: dict[str, dict[str, Any]] = {
    "window 2": {"mode": "interlock", "window": 2},
    "window 1.25, 1 extra": {"mode": "interlock", "window": 1.25, "extra_in_flight": 1},
    "local": {"mode": "local"},
    "global": {"mode": "global"},
}
_MODEL = {
    "cuda": {"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16},
    "cpu": {"model_type": "gpt2", "n_layer": 4, "n_embd": 64, "n_head": 2, "vocab_size": 512},
}
_SIZES = {
    "cuda": {
        "transports": "",
        "head_cost": "--dtype bfloat16 --micro_batch_size 8 --backends full chunked",
        "single_gpu": "--model_size 355M --modes local 'window 2' --batches 3",
        "profile": "--micro-batch-size 8 --seq-length 1024",
    },
    "cpu": {
        "transports": "--rows 64 --width 64 --batches 1",
        "head_cost": "--width 64 --num_heads 2 --vocab_size 1000 --seq_length 64 --repeats 1 --backends full",
        "single_gpu": "--modes local --micro_batches 2 --batches 1",
        "profile": "--micro-batch-size 1 --seq-length 64 --rounds 1",
    },
}
_LAST_CHARACTERS = 20_000


@dataclass(frozen=True)
class Step:
    """A command, by what it shows."""

    name: str
    arguments: tuple[str, ...]
    limit_seconds: float = 120.0


def steps(device: str, folder: Path, nccl: bool) -> Iterator[Step]:
    """What is run, with files in ``folder``; ``nccl``: whether ranks can use it."""
    size, transports = _SIZES[device], ["gloo", *(["nccl"] if nccl else [])]
    on_device = ("--device", device)
    for transport in transports:
        for name, section in _SECTIONS.items():
            config = folder / f"{name}, {transport}.json"
            key = {"transport": "gloo" if transport == "gloo" else "auto"}
            replace_text(config, json.dumps({"train_batch_size": 8, "interlock": {**section, **key}}))
            command = "verify", str(config), *on_device, "--stages", str(NUM_STAGES), "--timeout", "60"
            yield Step(f"verify {name}, {transport}", ("-m", "ds_interlock.cli", *command))
    for name, options in (
        ("transports", ("--transports", *transports)),
        ("head_cost", ()),
        ("single_gpu", ()),
    ):
        output = ("--output", str(folder / f"{name}.json"))
        yield Step(
            name, ("-m", f"benchmarks.{name}", *on_device, *options, *shlex.split(size[name]), *output), 180.0
        )
    config, model, profile = folder / "profile_config.json", folder / "model", folder / "profile.json"
    bf16 = {"bf16": {"enabled": True}} if device == "cuda" else {}
    section = _SECTIONS["window 2"] | {"head": {"token_fraction": 0.125}}
    replace_text(config, json.dumps({"train_batch_size": 64, "interlock": section, **bf16}))
    replace_text(model / "config.json", json.dumps(_MODEL[device]))
    command = ("profile", str(config), "--model", str(model), *shlex.split(size["profile"]))
    yield Step("profile", ("-m", "ds_interlock.cli", *command, "--output", str(profile)))
    command = ("plan", str(config), "--profile", str(profile), "--stages", str(NUM_STAGES), "--compare")
    yield Step("plan", ("-m", "ds_interlock.cli", *command, "--micro-batches", "4"))


def run(step: Step, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a step; its row for the results."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *step.arguments],
            env=environment,
            timeout=step.limit_seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        status, output = "ok" if done.returncode == 0 else f"exit {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = f"not done in {step.limit_seconds:g} s", str(error.stdout or "")
    return {
        **asdict(step),
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "output": output[-_LAST_CHARACTERS:],
    }


def nccl_fault(device: str) -> str:
    """Why ranks cannot use NCCL here; empty if they can."""
    if device == "cpu":
        return "there is no GPU"
    import torch

    number = torch.cuda.device_count()
    if number >= NUM_STAGES or nccl_version() >= SHARES_A_GPU:
        return ""
    need, found = (".".join(map(str, version)) for version in (SHARES_A_GPU, nccl_version()))
    return f"{NUM_STAGES} ranks on {number} GPUs need NCCL {need}, this is {found}"


def nccl_version() -> tuple[int, int, int]:
    """Of the library that torch has loaded; torch itself tells which one it was built with."""
    number = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    return number.value // 10000, number.value // 100 % 100, number.value % 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all steps, or those whose names begin with one of ``--steps``; 1 if one did not end well."""
    parser = command_parser(__doc__)
    parser.add_argument("--device", choices=tuple(_SIZES), default="cuda", help="(%(default)s)")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only those that begin so (all)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"), help="(%(default)s)")
    args = parser.parse_args(argv)
    # Several ranks of a GPU are refused by NCCL unless they are meant; under MPS each would have few queues.
    sharing = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    environment = {**sharing, **os.environ, "DS_ACCELERATOR": args.device}
    fault, rows = nccl_fault(args.device), []
    for step in steps(args.device, args.output_dir, not fault):
        if args.steps and not step.name.startswith(tuple(args.steps)):
            continue
        rows.append(row := run(step, environment))
        print(f"{step.name}: {row['status']}, {row['seconds']} s", flush=True)
        if row["status"] != "ok":
            print(row["output"][-2000:], flush=True)
        write_results(args.output_dir / "steps.json", without_nccl=fault, steps=rows)
    print(markdown(["step", "status", "seconds"], [[r["name"], r["status"], r["seconds"]] for r in rows]))
    if fault:
        print(f"Without NCCL: {fault}.")
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
