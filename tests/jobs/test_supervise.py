"""A job that fails is started again, a bounded number of times, and leaves nothing behind."""

import sys
import time
from pathlib import Path

import psutil
import pytest

from ds_interlock.jobs.supervise import main

# Adds a line to a file, leaves a process that sleeps, and fails until there are as many lines as it is given.
JOB = """
import subprocess, sys
path, wanted = sys.argv[1:]
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(path, "a") as file: file.write(f"{left.pid}\\n")
sys.exit(0 if len(open(path).readlines()) >= int(wanted) else 3)
"""


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("wanted", "min_seconds", "status", "runs"), [(3, 0, 0, 3), (9, 0, 3, 4), (3, 100, 3, 1)]
)
def test_restarts(tmp_path: Path, wanted: int, min_seconds: int, status: int, runs: int) -> None:
    log = tmp_path / "pids"
    words = ["--max_restarts", "3", "--min_seconds", str(min_seconds)]
    assert main([*words, sys.executable, "-c", JOB, str(log), str(wanted)]) == status
    left = [int(pid) for pid in log.read_text().split()]
    assert len(left) == runs
    deadline = time.monotonic() + 10
    while any(map(is_running, left)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
