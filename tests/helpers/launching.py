"""Jobs under the ``deepspeed`` launcher, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

from ds_interlock.transport.local_ranks import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300


def launch(*words: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Starts a job, and waits for it."""
    bin_folder = Path(sys.executable).parent
    command = [bin_folder / "deepspeed", "--num_gpus", ranks, "--master_port", free_port()]
    command += ["--log_level", "error", *words]
    path = os.pathsep.join([str(bin_folder), os.environ["PATH"]])
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
