"""Jobs under the ``deepspeed`` launcher, as a user starts them."""

import subprocess
from pathlib import Path

from measuring.launching import ROOT, environment, launch_command

TIMEOUT_SECONDS = 300


def launch(*words: object, ranks: int = 2, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Starts a job in ``folder``, and waits for it."""
    return subprocess.run(
        launch_command(ranks, *words),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
