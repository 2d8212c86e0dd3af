"""A process ends with the one that started it, even if that is killed and cannot tell anyone.

    supervise ─► deepspeed ─► deepspeed.launcher.launch ─► rank 0, rank 1, ...

The kernel tells a process that its parent has ended. If a signal ends ``deepspeed``, the launcher that it has
started goes on; so a thread of each rank looks.
"""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 1.0
_COMMANDS = {"deepspeed", "deepspeed.launcher.runner"}


def end_with_parent() -> None:
    """From now on this process gets ``SIGTERM`` when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def end_with_launcher() -> None:
    """The same when its parent's parent ends, if that is the command ``deepspeed``."""
    end_with_parent()
    launcher = os.getppid()
    command = _parent(launcher)
    words = Path(f"/proc/{command}/cmdline").read_text().split("\0") if command else []
    if _COMMANDS & {Path(word).name for word in words}:
        threading.Thread(target=_watch, args=(launcher, command), name="launcher", daemon=True).start()


def _watch(launcher: int, command: int) -> None:
    while _parent(launcher) == command:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _parent(process: int) -> int:
    """The number of its parent; 0 if it has ended or has none."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(status.rpartition(")")[2].split()[1])
