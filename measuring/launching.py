"""Jobs under the ``deepspeed`` launcher, started as a user does: processes on CPUs, output in a pipe."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""Of this checkout, where jobs are started."""

_BIN = Path(sys.executable).parent


def launch_command(num_ranks: int, job: str) -> list[str]:
    """The words that start ``job``, a script or ``--module NAME`` and its arguments, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"{_BIN / 'deepspeed'} --num_gpus {num_ranks} --master_port {port} --log_level error {job}"
    return words.split()


def start_process(
    command: Sequence[str], settings: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Starts it with one thread per rank, errors among the output, and ``settings`` in its environment."""
    path = os.pathsep.join([str(_BIN), os.environ["PATH"]])
    always = {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | always | (settings or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
