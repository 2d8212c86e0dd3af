"""Whatever above a rank is killed, no process of the job is left."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

# As ``deepspeed``, which starts a launcher, which starts a rank: each adds its number to a file.
DEEPSPEED = """
import os, subprocess, sys, time
level, path = int(sys.argv[1]), sys.argv[2]
if level == 0:
    from ds_interlock.jobs.orphans import end_with_launcher
    end_with_launcher()
with open(path, "a") as file: file.write(f"{os.getpid()}\\n")
if level == 0:
    time.sleep(600)
subprocess.run([sys.executable, __file__, str(level - 1), path])
"""


@pytest.mark.parametrize("killed", ["supervisor", "deepspeed", "launcher"])
def test_nothing_is_left(killed: str, tmp_path: Path) -> None:
    script, log = tmp_path / "deepspeed", tmp_path / "pids"
    script.write_text(DEEPSPEED)
    log.touch()
    words = ["-m", "ds_interlock.jobs.supervise", sys.executable, str(script), "2", str(log)]
    with subprocess.Popen([sys.executable, *words]) as supervisor:
        until(lambda: len(log.read_text().splitlines()) == 3)
        job = psutil.Process(supervisor.pid)
        names = "supervisor", "deepspeed", "launcher", "rank"
        processes = dict(zip(names, [job, *job.children(recursive=True)], strict=True))
        processes[killed].send_signal(signal.SIGKILL)
        until(lambda: not any(map(is_alive, processes.values())))


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
