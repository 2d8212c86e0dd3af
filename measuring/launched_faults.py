"""SIGKILL of what starts a job: the command ``deepspeed``, its launcher, and the supervisor of both.

A small job of ``ds_interlock.jobs`` in two processes is started as a user does. Something above its ranks is
killed in a random step. Within a few seconds nothing may be left, and the same command must end with the
weights of an undisturbed job, bit for bit; under a supervisor that is still there, by itself.
"""

import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from measuring.launching import launch_command, start_process

KINDS = {
    "SIGKILL of deepspeed": (False, 0),
    "SIGKILL of its launcher": (False, 1),
    "SIGKILL of the supervisor": (True, 0),
    "SIGKILL of deepspeed, supervised": (True, 1),
}
"""Whether there is a supervisor, and how many processes are above the one that is killed."""
_STEPS, _SAVE_STEPS = 60, 7
_SMALL = "--vocab_size 300 --seq_length 16 --width 16 --num_blocks 4 --num_heads 2 --max_eval_samples 32"
_FEW_SECONDS = 10.0
_LIMIT_SECONDS = 300.0

Row = dict[str, Any]


def run_launched(seed: int) -> Row:
    """Kills one process above a job, and resumes; ``problems`` says what was not as it should be."""
    kind = list(KINDS)[seed % len(KINDS)]
    is_supervised, depth = KINDS[kind]
    step = random.Random(seed).randint(1, _STEPS - 1)
    row: Row = {"seed": seed, "kind": kind, "step": step}
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        command = _command(Path(folder), supervised=is_supervised)
        job = start_process(command)
        output = _read_until(job, rf"step {step}/")
        if job.poll() is not None:
            raise RuntimeError(f"the job ended by itself: {output[-1000:]}")
        above = psutil.Process(job.pid)
        processes = [above, *above.children(recursive=True)]
        killed, started = processes[depth], time.monotonic()
        killed.kill()
        restarts = is_supervised and depth > 0
        left = _wait_for_end(processes[1:] if restarts else processes)
        row["seconds"] = round(time.monotonic() - started, 2)
        problems += [f"left behind: {' '.join(process.cmdline())[:200]}" for process in left]
        if not restarts:
            _end(job)
            job = start_process(command)
        output = _read_until(job, None)
        if status := job.wait():
            problems.append(f"the resumed job ended with status {status}: {output[-300:]}")
        elif _weights(Path(folder)) != _undisturbed():
            problems.append("the resumed job has other weights")
        names = [path.name for path in Path(folder).rglob("*.unfinished")]
        problems += [f"left behind: {name}" for name in names]
    return {**row, "problems": problems}


@cache
def _undisturbed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        job = start_process(_command(Path(folder), supervised=False))
        output = _read_until(job, None)
        if job.wait():
            raise RuntimeError(f"the undisturbed job failed: {output[-1000:]}")
        return _weights(Path(folder))


def _weights(folder: Path) -> bytes:
    return (folder / "output" / "hf" / "model.safetensors").read_bytes()


def _command(folder: Path, *, supervised: bool) -> list[str]:
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"Text {n}. " + "One and two, and so on. " * (40 + n % 7) for n in range(30)))
    job = f"launcher/train_lm.py --deepspeed_config configs/local.json --train_file {text} {_SMALL}"
    job += f" --output_dir {folder / 'output'} --max_steps {_STEPS} --save_steps {_SAVE_STEPS}"
    job += " --save_total_limit 2 --logging_steps 1 --generate 0 --resume_from_checkpoint auto"
    supervisor = f"{sys.executable} -m ds_interlock.jobs.supervise --min_seconds 0".split()
    return [*(supervisor if supervised else ()), *launch_command(2, *job.split())]


def _read_until(job: "subprocess.Popen[str]", pattern: str | None) -> str:
    """What it prints up to the first line that has ``pattern``, or to its end."""
    assert job.stdout
    lines = []
    for line in job.stdout:
        lines.append(line)
        if pattern and re.search(pattern, line):
            break
    return "".join(lines)


def _wait_for_end(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended within a few seconds; they are ended then."""
    end = time.monotonic() + _FEW_SECONDS
    while (left := [process for process in processes if _is_alive(process)]) and time.monotonic() < end:
        time.sleep(0.05)
    for process in left:
        process.kill()
    return left


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(job: "subprocess.Popen[str]") -> None:
    job.kill()
    job.communicate()
