r"""Starts a job again when it fails: from its newest checkpoint, a bounded number of times.

    python -m ds_interlock.jobs.supervise --max_restarts 3 \\
        deepspeed --num_gpus 4 launcher/train_lm.py --output_dir runs/a --resume_from_checkpoint auto ...

The command must resume by itself where a checkpoint exists. It runs in a process group of its own, and
whatever it leaves is killed before it starts again; if the supervisor is killed, the command ends too. Bad
input fails in the same way each time, so a run that ends within ``--min_seconds`` is not repeated.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from ds_interlock.jobs.orphans import end_with_parent


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the last run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max_restarts", type=int, default=3, help="how often at most (%(default)s)")
    parser.add_argument("--min_seconds", type=float, default=30.0, help="of a run to repeat (%(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what starts the job")
    args = parser.parse_args(argv)
    for restarts_left in range(args.max_restarts, -1, -1):
        started = time.monotonic()
        status = _run(args.command)
        is_hopeless = time.monotonic() - started < args.min_seconds
        if status == 0 or is_hopeless or restarts_left == 0:
            break
        print(
            f"supervise: the job ended with status {status}; {restarts_left} restarts left", file=sys.stderr
        )
    return status


def _run(command: Sequence[str]) -> int:
    """Runs ``command`` and ends what it leaves; its exit status, 128 and the signal that ended it."""
    job = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.killpg(job.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = job.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        with suppress(ProcessLookupError):  # nothing is left
            os.killpg(job.pid, signal.SIGKILL)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
