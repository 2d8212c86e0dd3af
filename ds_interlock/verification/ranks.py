"""The processes of a verification, seen from the one that starts them.

    this process ── starts ──►  rank 0, 1, ... K-1    each its own interpreter, CPU, one thread
          │  ▲                     │
          │  └── the job's store ──┤                  which port, how far are you
          └───── a folder ◄────────┘                  job, logs, outcomes, reasons of failure

No launcher is needed, what the ranks print stays in their logs, and nothing outlives ``run_job``.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it without a type

import ds_interlock
from ds_interlock.errors import PeerError
from ds_interlock.verification.rank import RUNS_DONE, Job, Outcome, Run

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 2.0
"""Time for a failed rank's neighbours to say what they saw, and for a stopped one to go."""


def run_job(
    stage_bounds: Sequence[int],
    runs: Sequence[Run],
    *,
    seed: int,
    timeout_seconds: float,
    progress: Callable[[str], None],
) -> dict[Run, Outcome]:
    """Trains the small model in as many processes as there are stages.

    Args:
        stage_bounds: How the layers are cut.
        runs: What to train, one after the other.
        seed: Of weights and data.
        timeout_seconds: Limit for everything together.
        progress: Is told in a few words what goes on.

    Returns:
        For each run, what all stages got.

    Raises:
        PeerError: If a process fails, saying why, or the time is up.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ds_interlock_verify_")))
        # Port 0: the system chooses a free one, and it is taken from that moment on.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = Job(store.port, tuple(stage_bounds), seed, timeout_seconds, tuple(runs))
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_stop, processes)
        for rank in range(job.num_stages):
            processes.append(_start(folder, rank, job))
        _wait(processes, folder, store, job, progress)
        return _outcomes(folder, job)


def _start(folder: Path, rank: int, job: Job) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.num_stages),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        # The package this process runs, installed or not.
        "PYTHONPATH": os.pathsep.join(
            [str(Path(ds_interlock.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    with (folder / f"rank_{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ds_interlock.verification.rank", str(folder), str(rank)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    folder: Path,
    store: TCPStore,
    job: Job,
    progress: Callable[[str], None],
) -> None:
    """Until all processes have ended well; raises PeerError otherwise."""
    deadline = time.monotonic() + job.timeout_seconds
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            break
        done = store.add(RUNS_DONE, 0)
        seconds_left = deadline - time.monotonic()
        if seconds_left <= 0:
            raise PeerError(
                f"{done} of {len(job.runs)} runs in {job.num_stages} processes were finished after "
                f"{job.timeout_seconds:g} seconds; allow more with --timeout, or use "
                "fewer --stages"
            )
        said = f"{done} of {len(job.runs)} runs done" if done else "starting; this takes some seconds"
        progress(f"processes ({job.num_stages}): {said}")
        time.sleep(_POLL_SECONDS)
    if any(process.returncode != 0 for process in processes):
        raise PeerError(_why(processes, folder))


def _why(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> str:
    """What the failed ranks say; the neighbours of one that fails soon say so too."""
    until = time.monotonic() + _GRACE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    lines = []
    for rank, process in enumerate(processes):
        if process.returncode:
            said = folder / f"rank_{rank}.error"
            log = (folder / f"rank_{rank}.log").read_text(encoding="utf-8", errors="replace").strip()
            reason = said.read_text(encoding="utf-8") if said.exists() else log.rpartition("\n")[2]
            lines.append(f"  rank {rank} ended with status {process.returncode}: {reason}")
    return "\n".join(["the processes could not carry out the plan", *lines])


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _outcomes(folder: Path, job: Job) -> dict[Run, Outcome]:
    """Puts the stages' parts together: each parameter belongs to one stage."""
    parts = [torch.load(folder / f"rank_{rank}.pt") for rank in range(job.num_stages)]
    return {
        run: Outcome(
            gradients={name: value for part in parts for name, value in part[number]["gradients"].items()},
            weights={name: value for part in parts for name, value in part[number]["weights"].items()},
            loss=parts[-1][number]["loss"],
        )
        for number, run in enumerate(job.runs)
    }
