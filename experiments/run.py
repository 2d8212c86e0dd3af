"""Runs an experiment: every mode with every seed, a line in the results file for each.

    python -m experiments.run transformer --jobs 2       # all runs, two at a time
    python -m experiments.run transformer --resume       # what is missing, from where it stopped
    python -m experiments.report                         # docs/results.md, from the results files

An experiment is a file in experiments/definitions, or "finetune" or "objectives" (finetune.py). Each run
computes in one thread; those of finetune.py are jobs of several processes. ``--set`` changes the
definition, as ``--set training.num_steps=100 model.width=32``, for results in a file of their own.
"""

import argparse
import math
import re
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ds_interlock.errors import ConfigError
from experiments import definition, finetune
from experiments.definition import Run
from experiments.training import train
from measuring import results_file
from measuring.command import command_parser, exit_status
from measuring.results_file import RESULTS

CHECKPOINTS = Path("runs/experiments")

AnyRun = Run | finetune.Run


def main(argv: Sequence[str] | None = None) -> int:
    """Does all runs that are not in the results file yet; the exit status."""
    parser = command_parser(__doc__)
    parser.add_argument("name", help=f"the experiment: {', '.join([*definition.names(), *finetune.NAMES])}")
    parser.add_argument("--device", default="cpu", help="where to compute, as torch names it (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="do only what is missing in the results file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="only these modes (all)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds (all)")
    parser.add_argument("--output", type=Path, help=f"the results file ({RESULTS}/NAME.jsonl)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="in the definition; see above"
    )
    text = "end after so long: the run at work is evaluated, and goes to NAME_stopped.jsonl"
    parser.add_argument("--limit_seconds", type=float, default=math.inf, metavar="S", help=text)
    parser.add_argument("--no_checkpoints", action="store_true", help="save nothing to resume from")
    text = "leave the folders of fine-tuning jobs, with their checkpoints, in runs/experiments/finetune"
    parser.add_argument("--keep_jobs", action="store_true", help=text)
    args = parser.parse_args(argv)
    if args.set and not args.output:
        parser.error("--set: results of another definition need a file of their own, --output")
    args.deadline = time.time() + args.limit_seconds
    args.output = args.output or RESULTS / f"{args.name}.jsonl"
    return exit_status(partial(_do_missing, args))


def _do_missing(args: argparse.Namespace) -> None:
    runs = _missing(args)
    for line in tqdm(_finished(runs, args), total=len(runs), unit="run", disable=None):
        tqdm.write(line)


def _missing(args: argparse.Namespace) -> list[AnyRun]:
    is_finetune = args.name in finetune.NAMES
    runs: Sequence[AnyRun] = finetune.runs(args.name) if is_finetune else _defined(args)
    modes = dict.fromkeys(run.mode for run in runs)
    if unknown := [mode for mode in args.modes or () if mode not in modes]:
        raise ConfigError(
            f"--modes: the experiment has no {', '.join(unknown)}: expected some of {', '.join(modes)}"
        )
    records = results_file.read(args.output)
    if records and not args.resume:
        raise ConfigError(
            f"{args.output} has {len(records)} runs already: give --resume to add those that are missing, or "
            "another --output"
        )
    done = [type(runs[0]).model_validate(record.get("run", record)) for record in records]
    return [
        run
        for run in runs
        if run.mode in (args.modes or modes) and run.seed in (args.seeds or [run.seed]) and run not in done
    ]


def _defined(args: argparse.Namespace) -> list[Run]:
    """The runs of the experiment's file, with the changes of ``--set``."""
    contents = definition.load(args.name).model_dump()
    for change in args.set:
        *path, key = change.partition("=")[0].split(".")
        section = contents
        for part in path:
            section = section[part] if isinstance(section.get(part), dict) else {}
        if key not in section:
            raise ConfigError(f"--set {change}: expected KEY=VALUE, as training.num_steps=100")
        section[key] = _value(change.partition("=")[2])
    return definition.checked(contents, "--set").runs(args.name)


def _value(text: str) -> Any:
    """As in TOML; what is no TOML value is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _finished(runs: list[AnyRun], args: argparse.Namespace) -> Iterator[str]:
    """Does the runs; says a line about each as it ends."""
    how = {"device": args.device, "deadline": args.deadline, "saves": not args.no_checkpoints}
    do = partial(_do, output=args.output, keeps=args.keep_jobs, **how)
    if args.jobs == 1:
        yield from map(do, runs)
        return
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(do, run) for run in runs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _do(run: AnyRun, output: Path, device: str, deadline: float, saves: bool, keeps: bool) -> str:
    seconds_left = deadline - time.time()
    if seconds_left <= 0:
        return f"{run.mode}, seed {run.seed}: not begun, the time is up"
    if isinstance(run, finetune.Run):
        results_file.append(output, finetune.carry(run, keeps))
        return f"{run.mode}, {run.heads} heads, seed {run.seed}"
    file_name = re.sub(r"[^a-z0-9.]+", "-", run.mode.lower())
    checkpoint = CHECKPOINTS / run.experiment / f"{file_name}-{run.seed}.pt" if saves else None
    torch.set_num_threads(1)
    record = train(run, checkpoint, device, seconds_left)
    stopped = record.get("stopped_after")
    results_file.append(output.with_stem(f"{output.stem}_stopped") if stopped else output, record)
    if checkpoint is not None and not stopped:
        checkpoint.unlink()
    score = ", ".join(f"{name} {value:.4f}" for name, value in record["final"].items())
    steps = f"{stopped or run.training.num_steps} of {run.num_steps} steps"
    return f"{run.mode}, seed {run.seed}: {score} after {steps}, {record['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
