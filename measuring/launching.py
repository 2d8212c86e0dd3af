"""Jobs under the ``deepspeed`` launcher, as a user starts them: a process per rank, on CPUs."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""Of this checkout."""

_BIN = Path(sys.executable).parent


def launch_command(num_ranks: int, *words: object) -> list[str]:
    """The words that start a job: ``words`` are a script, or ``--module`` and a name, and its arguments."""
    launcher = [_BIN / "deepspeed", "--num_gpus", num_ranks, "--master_port", free_port()]
    return [str(word) for word in (*launcher, "--log_level", "error", *words)]


def environment() -> dict[str, str]:
    """This process's environment for a job: one thread per rank, this checkout's package and commands."""
    path = os.pathsep.join([str(_BIN), os.environ["PATH"]])
    ours = {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | ours


def start_process(
    command: Sequence[str], settings: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Starts it in this checkout, errors among the output, with ``settings`` in its environment."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | dict(settings or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    """A port on which no process listens, below those that systems give out by themselves."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("each of a hundred ports between 20,000 and 32,000 is in use")
