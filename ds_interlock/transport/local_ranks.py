"""A function on K ranks of this machine, in processes that end with it. No launcher is needed.

    run_local_ranks(work, 2) ─► server ─fork─► rank 0: work() ─┐
                                       ─fork─► rank 1: work() ─┤
         [result of rank 0, of rank 1]  ◄──────────────────────┘

The processes are forked from a server that has imported DeepSpeed, so that a job of eight starts in a
second and not in twenty. A process in which an accelerator may have been initialised cannot be forked;
ranks that use one are started anew (``fork=False``). What ranks print goes to a log each.
"""

import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ds_interlock.errors import PeerError

_PRELOADED = ("deepspeed", "ds_interlock.engine.initialize")
_GRACE_SECONDS = 2.0
"""Time for the neighbours of a failed rank to report what they saw."""

_LOG_LINES = 40


@dataclass(frozen=True)
class Failure:
    """Why a rank gave no result.

    Attributes:
        reason: The error, or with which status the process ended.
        details: The traceback; empty if the process died.
    """

    reason: str
    details: str = ""


class RankError(PeerError):
    """A function failed on some ranks.

    Attributes:
        failures: By rank. The first is the cause of the others, as far as can be seen.
    """

    def __init__(self, failures: dict[int, Failure], logs: Path) -> None:
        # A rank that died is why the others failed, whichever was heard first.
        self.failures = dict(sorted(failures.items(), key=lambda item: bool(item[1].details)))
        rank, failure = next(iter(self.failures.items()))
        log = (logs / f"{rank}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        end = "\n".join(log[-_LOG_LINES:])
        super().__init__(
            f"rank {rank} failed\n{failure.details or failure.reason}\n--- end of its log\n{end}"
        )


def run_local_ranks(
    work: Callable[[], Any],
    num_ranks: int,
    *,
    fork: bool = True,
    preload: Sequence[str] = (),
    timeout_seconds: float | None = None,
    on_report: Callable[[Any], None] = lambda _: None,
) -> list[Any]:
    """Calls ``work()`` on ``num_ranks`` ranks. It finds its rank in the environment, as under a launcher.

    Args:
        work: A function at the top of a module, or a ``partial`` of one. It and its results are picklable.
        num_ranks: World size.
        fork: Whether ranks are forked from the server.
        preload: Modules that the server imports besides DeepSpeed; they count in the first call only.
        timeout_seconds: Limit for everything together.
        on_report: Called with what ranks pass to ``report``.

    Returns:
        What it returned, by rank.

    Raises:
        RankError: If it failed on some rank.
        TimeoutError: If the time is up.
    """
    context: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
    if fork:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_PRELOADED, *preload])
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    job = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks: dict[Connection, BaseProcess] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        try:
            for rank in range(num_ranks):
                ours, theirs = context.Pipe()
                settings = {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                arguments = (work, settings, theirs, logs / f"{rank}.log")
                process = context.Process(target=_serve, args=arguments)
                ranks[ours] = process
                process.start()
                theirs.close()
            return _collect(ranks, logs, deadline, on_report)
        finally:
            for started in ranks.values():
                if started.pid is not None:
                    started.kill()
                    started.join()


def free_port() -> int:
    """A port on which no process listens.

    It is below those that systems hand out by themselves: one of these may be in use again before the job
    that it is for has begun to listen. Processes that look at the same time look in different places.
    """
    for port in random.SystemRandom().sample(range(20_000 + os.getpid() % 64, 32_000, 64), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("each of a hundred ports between 20,000 and 32,000 is in use")


def _collect(
    ranks: dict[Connection, BaseProcess], logs: Path, deadline: float | None, on_report: Callable[[Any], None]
) -> list[Any]:
    """One result from each rank."""
    numbers = {connection: rank for rank, connection in enumerate(ranks)}
    results: dict[int, Any] = {}
    failures: dict[int, Failure] = {}
    while waiting := [c for c, rank in numbers.items() if rank not in results and rank not in failures]:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(waiting, left)
        if not ready and not failures:
            raise TimeoutError
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = numbers[connection]
            try:
                kind, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                ranks[connection].join()
                kind, value = "failure", Failure(f"the process died with status {ranks[connection].exitcode}")
            if kind == "report":
                on_report(value)
            elif kind == "result":
                results[rank] = value
            else:
                failures[rank] = value
                if len(failures) == 1:
                    deadline = time.monotonic() + _GRACE_SECONDS
    if failures:
        raise RankError(failures, logs)
    return [results[rank] for rank in range(len(ranks))]


# On the ranks.

_send: Callable[[str, Any], None] = lambda kind, value: None  # noqa: E731 - replaced on a rank


def report(value: Any) -> None:
    """Sends ``value`` to the process that started this rank, whose ``on_report`` gets it."""
    _send("report", value)


def _serve(work: Callable[[], Any], settings: dict[str, str], connection: Connection, log: Path) -> None:
    """What a process does: works, answers, and is ended by the one that started it."""
    global _send
    with log.open("w", encoding="utf-8") as file:  # DeepSpeed prints a lot
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(settings)
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()

    def send(kind: str, value: Any) -> None:
        connection.send_bytes(pickle.dumps((kind, value)))  # not send: it would leave tensors in this process

    _send = send
    try:
        import torch
        from torch import distributed as dist

        torch.set_num_threads(1)
        answer: tuple[str, Any] = "result", work()
        if dist.is_initialized():
            dist.barrier()  # no rank leaves while others still send
    except Exception as error:  # noqa: BLE001 - raised again where the job was started
        answer = "failure", Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
    send(*answer)
    sys.stdout.flush()
    os._exit(0)  # engines must not drain at exit: their peers may be gone


def _end_with_parent(connection: Connection) -> None:
    """Ends a rank whose starter is gone, even if it hangs. The starter sends nothing."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
