"""Jobs under the ``deepspeed`` launcher, as a user starts them."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300


def launch(*words: object, ranks: int = 2, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Starts a job in ``folder``, and waits for it."""
    bin_folder = Path(sys.executable).parent
    command = [bin_folder / "deepspeed", "--num_gpus", ranks, "--master_port", free_port()]
    command += ["--log_level", "error", *words]
    path = os.pathsep.join([str(bin_folder), os.environ["PATH"]])
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def free_port() -> int:
    """A port on which no process listens, below those that systems give out by themselves."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("each of a hundred ports between 20,000 and 32,000 is in use")
