"""Faults at random moments of a small job: how each ends, and whether the resumed job is as if nothing was.

    python -m measuring.faults --seeds 200 --launched 12 --output docs/reliability.json

Each seed picks a fault, the rank and the batch that it happens in, the mode, and the number of stages and
replicas. The job must end within its time limit plus a few seconds, each rank that is left with one sentence
that names stage, peer, batch and cause. Nothing may be left behind: no process, no shared memory, no file
that is half written. Then the same job resumes from its newest checkpoint, and must end with the weights of
one that nothing happened to, bit for bit. Faults above the ranks follow (``measuring.launched_faults``).
Results are written after each seed; ``--resume`` leaves out those that are there.
"""

import json
import os
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil

from ds_interlock.transport.local_ranks import RankError, run_local_ranks
from measuring.command import command_parser
from measuring.fault_job import (
    EVALUATION,
    INJECTED,
    NEW_PHASE,
    NUM_BATCHES,
    SAVES,
    SECTIONS,
    TIMEOUTS,
    Fault,
    train,
)
from measuring.launched_faults import run_launched
from measuring.results import markdown, write_results

_ANYWHERE = ("start", "forward", "relay", "weight gradient", "step", "saving", "evaluation", "end")
PHASES: dict[str, Sequence[str]] = {
    **dict.fromkeys(
        ("SIGKILL", "SIGSEGV", "SIGSTOP", "slow rank", "aborted connections", "exception"),
        (*_ANYWHERE, "change of phase"),
    ),
    "exception in the loss": ["head"],
    "exception in the data": ["reading"],
    "nonfinite loss": ["head"],
    "nonfinite gradient": ["gradient"],
    "full disk": ["saving"],
    "shapes": ["forward"],
    "number of batches": ["forward"],
}
"""For each kind of fault when it can happen."""
SHAPES = ((3, 1), (2, 2))
"""Stages and replicas."""
_CAUSES = {"exception": INJECTED, "nonfinite": "NonfiniteError", "SIG": "", "full disk": ""}
"""What the sentences of the other ranks say besides the rank that it happened on, by how kinds begin."""
_LIMIT_SECONDS = 600.0
_FEW_SECONDS = 10.0
_GRACE_SECONDS = SHAPES[0][0] * TIMEOUTS["timeout_seconds"] + _FEW_SECONDS
"""The longest limit, that of a collective: a rank may need all of it before it says what it missed."""
_SENTENCE = re.compile(r"stage \d+ \(rank \d+\).*(in batch \d+|at the start)", re.DOTALL)

Row = dict[str, Any]


def choose(seed: int) -> tuple[Fault, str, int, int]:
    """A fault, the name of the ``"interlock"`` section, stages and replicas."""
    draw = random.Random(seed)
    kind = list(PHASES)[seed % len(PHASES)]  # as often each
    phase = draw.choice(PHASES[kind])
    section = draw.choice(["schedule"] if phase == "change of phase" else list(SECTIONS))
    num_stages, num_replicas = SHAPES[0] if phase == "relay" else draw.choice(SHAPES)
    first, last = 0, num_stages - 1
    if phase == "relay":  # only these have one
        section, first = ("window 2" if section == "global" else section), 1
    if phase == "reading":
        last = 0
    if phase == "head" or (kind == "number of batches"):
        first = last
    if kind == "shapes":
        last -= 1
    rank = draw.randint(first * num_replicas, (last + 1) * num_replicas - 1)
    batch = draw.randint(1, NUM_BATCHES)
    batch = {
        "start": 1,
        "saving": draw.choice(SAVES) + 1,
        "evaluation": EVALUATION + 1,
        "change of phase": NEW_PHASE + 1,
        "end": NUM_BATCHES + 1,
    }.get(phase, batch)
    if phase == "relay" and section == "schedule":  # local has no relays
        batch = draw.randint(NEW_PHASE + 1, NUM_BATCHES)
    return Fault(kind, phase, rank, batch), section, num_stages, num_replicas


def run_seed(seed: int) -> Row:
    """Injects one fault, and resumes; ``problems`` says what was not as it should be."""
    fault, section, num_stages, num_replicas = choose(seed)
    num_ranks = num_stages * num_replicas
    row: Row = {
        "seed": seed,
        "kind": fault.kind,
        "phase": fault.phase,
        "rank": fault.rank,
        "batch": fault.batch,
    }
    row |= {"section": section, "stages": num_stages, "replicas": num_replicas}
    undisturbed = _undisturbed(section, num_stages, num_ranks)
    left_before = _left_behind()
    with tempfile.TemporaryDirectory() as folder:
        reached: list[float] = []
        results, failures = _run(section, num_stages, num_ranks, folder, fault, reached)
        row["seconds"] = round(time.time() - reached[0], 2) if reached else None
        problems = [] if reached else ["the fault was never reached"]
        if fault.kind == "slow rank":
            problems += [f"ended: {reason}"[:400] for reason in failures.values()]
            problems += [] if failures or results == undisturbed else ["has other weights"]
        else:
            problems += end_problems(fault, row["seconds"] or 0.0, failures, num_ranks)
        problems += [f"left behind: {what}" for what in sorted(_left_behind() - left_before)]
        row["sentence"] = next((reason for rank, reason in failures.items() if rank != fault.rank), "")[:400]
        if fault.kind != "slow rank":
            resumed, failed = _run(section, num_stages, num_ranks, folder, None, [])
            row["resumed_from"] = "a checkpoint" if fault.batch > SAVES[0] + 1 else "the beginning"
            problems += [f"the resumed job: {reason}"[:400] for reason in failed.values()]
            if not failed and resumed != undisturbed:
                problems.append("the resumed job has other weights")
        names = [path.name for path in Path(folder).rglob("*")]
        problems += [f"left behind: {name}" for name in names if "unfinished" in name or "replaced" in name]
    return {**row, "problems": problems}


def end_problems(fault: Fault, seconds: float, failures: dict[int, str], num_ranks: int) -> list[str]:
    """What is wrong with how the job ended: seconds from the fault to the end, and reasons by rank."""
    if not failures:
        return ["the job did not end"]
    section = {"start": "setup_", "saving": "checkpoint_"}.get(fault.phase, "")
    waits = fault.kind in ("SIGSTOP", "number of batches")
    times = num_ranks if not section else 1
    limit = _FEW_SECONDS + (times * TIMEOUTS[f"{section}timeout_seconds"] if waits else 0.0)
    problems = [f"took {seconds:.1f} s, expected {limit:g}"] if seconds > limit else []
    is_gone = fault.kind.startswith("SIG")
    for rank in set(range(num_ranks)) - ({fault.rank} if is_gone else set()):
        if rank not in failures:
            problems.append(f"rank {rank} said nothing")
        elif rank != fault.rank and not _SENTENCE.search(failures[rank]):
            problems.append(f"rank {rank} does not name stage, peer and batch: {failures[rank]}")
    others = [reason for rank, reason in failures.items() if rank != fault.rank]
    cause = next((words for kind, words in _CAUSES.items() if fault.kind.startswith(kind)), None)
    # In the script, outside the engine's calls. And which end has closed a connection, nobody knows.
    if fault.phase in ("start", "end") and fault.kind != "aborted connections":
        cause = ""
    if cause is not None:
        # A nan travels, so that several stages may find it by themselves.
        named = (cause,) if cause == "NonfiniteError" else (cause, f"(rank {fault.rank})")
        problems += [f"not the cause: {reason}" for reason in others if any(n not in reason for n in named)]
    return [problem[:400] for problem in problems]


@cache
def _undisturbed(section: str, num_stages: int, num_ranks: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        results, failures = _run(section, num_stages, num_ranks, folder, None, [])
    if failures:
        raise RuntimeError(f"the undisturbed job failed: {failures}")
    return results


def _run(
    section: str, num_stages: int, num_ranks: int, folder: str, fault: Fault | None, reached: list[float]
) -> tuple[list[str], dict[int, str]]:
    """Results by rank, or reasons of failure."""
    work = partial(train, section, num_stages, folder, fault)
    preload = ["measuring.fault_job"]
    try:
        return run_local_ranks(
            work,
            num_ranks,
            preload=preload,
            timeout_seconds=_LIMIT_SECONDS,
            on_report=reached.append,
            grace_seconds=_GRACE_SECONDS,
        ), {}
    except RankError as error:
        return [], {rank: failure.reason for rank, failure in error.failures.items()}
    except TimeoutError as error:
        return [], {-1: f"did not end: {error}"}


def _left_behind() -> set[str]:
    """Shared memory but semaphores, of which ranks make none, and processes below this one."""
    processes = {f"process {p.pid}" for p in psutil.Process().children(recursive=True)}
    return processes | {f"shared memory {path.name}" for path in Path("/dev/shm").glob("[!s]*")}


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table of the kinds of faults: how many, how many without a problem, and the longest time.

    Below it the longest time until a rank said what was wrong.
    """
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    cells = [
        (
            kind,
            len(of_kind),
            sum(not row["problems"] for row in of_kind),
            max(row["seconds"] or 0.0 for row in of_kind),
        )
        for kind, of_kind in sorted(kinds.items())
    ]
    table = markdown(["fault", "injected", "as expected", "seconds to the end, at most"], cells)
    errors = [row for row in rows if row.get("sentence")]
    longest = max(errors, key=lambda row: row["seconds"] or 0.0, default=None)
    what = f"{longest['seconds']} s ({longest['kind']}, seed {longest['seed']})" if longest else "none"
    return f"{table}\n\nLongest time to an error: {what}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the seeds; 1 if one of them had a problem."""
    parser = command_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many faults (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (%(default)s)")
    parser.add_argument("--launched", type=int, default=0, help="how many above the ranks (%(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, without problems")
    args = parser.parse_args(argv)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    results: dict[str, list[Row]] = {"rows": [], "launched": []}
    if args.resume and args.output and args.output.exists():
        old = json.loads(args.output.read_text())
        results = {name: [row for row in old.get(name, ()) if not row["problems"]] for name in results}
    every = range(args.first, args.first + args.seeds)
    for name, run, seeds in (("rows", run_seed, every), ("launched", run_launched, range(args.launched))):
        done = {row["seed"] for row in results[name]}
        for seed in [seed for seed in seeds if seed not in done]:
            row = run(seed)
            results[name] = sorted([*results[name], row], key=lambda row: row["seed"])
            when = row.get("phase") or f"step {row['step']}"
            print(f"{seed}: {row['kind']}, {when}: {row['seconds']} s", *row["problems"], sep="\n    ")
            sys.stdout.flush()
            if args.output:
                write_results(args.output, **results)
    rows = [*results["rows"], *results["launched"]]
    print(summary(rows))
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
