"""A function on K ranks of this machine, in processes that end with it. No launcher is needed.

    run_local_ranks(work, 2) ─► server ─fork─► rank 0: work() ─┐
                                       ─fork─► rank 1: work() ─┤
         [result of rank 0, of rank 1]  ◄──────────────────────┘

The processes are forked from a server that has imported DeepSpeed, so that a job of eight starts in a
second and not in twenty. A process in which an accelerator may have been initialised cannot be forked;
ranks that use one are new processes. What ranks print goes to one log per rank.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
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

from ds_interlock.errors import ConfigError, PeerError

_PRELOADED = ("deepspeed", "torch._dynamo", "ds_interlock.engine.initialize")
_DUMP_SECONDS = 0.5
"""Time for ranks to write their stacks."""

_LOG_LINES = 40


@dataclass(frozen=True)
class Failure:
    """Why a rank gave no result: the error or exit status, and its traceback unless it died."""

    reason: str
    details: str = ""


class RankError(PeerError):
    """A function failed on some ranks: ``failures`` by rank, the first of which caused the others."""

    def __init__(self, failures: dict[int, Failure], logs: Path) -> None:
        # A rank that died is why the others failed, whichever was heard first.
        self.failures = dict(sorted(failures.items(), key=lambda item: bool(item[1].details)))
        rank, failure = next(iter(self.failures.items()))
        super().__init__(
            f"rank {rank} failed\n{failure.details or failure.reason}\n{_end_of_log(logs, rank)}"
        )


def run_local_ranks(
    work: Callable[[], Any],
    num_ranks: int,
    *,
    device: str = "cpu",
    preload: Sequence[str] = (),
    timeout_seconds: float | None = None,
    on_report: Callable[[Any], None] = lambda _: None,
    grace_seconds: float = 2.0,
) -> list[Any]:
    """Calls ``work()`` on ``num_ranks`` ranks. It finds its rank in the environment, as under a launcher.

    Args:
        work: A function at the top of a module, or a ``partial`` of one. It and its results are picklable.
        num_ranks: World size.
        device: What ranks work on, as torch names it: "cuda" for one GPU each, or some for each GPU if there
            are fewer. They are forked from the server on CPUs only.
        preload: Modules that the server imports besides DeepSpeed; they count in the first call only.
        timeout_seconds: Limit for everything together.
        on_report: Called with what ranks pass to ``report``.
        grace_seconds: How long, once a rank has failed, the others have to say what they saw before they are
            ended. Not waited for are those that a signal has stopped.

    Raises:
        ConfigError: If no such device is there.
        RankError: If it failed on some rank.
        TimeoutError: If the time is up; with the end of each unfinished rank's log, and its stacks.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    context, num_devices = _context(device, preload), _num_devices(device, num_ranks)
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    # The system picks the port when the store begins to listen: no process can take it in between.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # all ranks join our store, rank 0 opens none
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    ranks: dict[Connection, BaseProcess] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        try:
            for rank in range(num_ranks):
                ours, theirs = context.Pipe()
                settings = {**job, "RANK": str(rank), "LOCAL_RANK": str(rank % num_devices)}
                process = context.Process(target=_serve, args=(work, settings, theirs, _log(logs, rank)))
                ranks[ours] = process
                process.start()
                theirs.close()
            return _collect(ranks, logs, deadline, on_report, grace_seconds)
        finally:
            for started in ranks.values():
                if started.pid is not None:
                    started.kill()
                    started.join()


def _context(device: str, preload: Sequence[str]) -> ForkServerContext | SpawnContext:
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, *preload])
    return context


def _num_devices(device: str, num_ranks: int) -> int:
    """How many devices there are for ``num_ranks``, each of which has a CPU."""
    if device == "cpu":
        return num_ranks
    import torch

    number: int = torch.get_device_module(device).device_count()
    if not number:
        raise ConfigError(f"there is no {device} device here")
    return number


def _collect(
    ranks: dict[Connection, BaseProcess],
    logs: Path,
    deadline: float | None,
    on_report: Callable[[Any], None],
    grace_seconds: float,
) -> list[Any]:
    """One result from each rank."""
    numbers = {connection: rank for rank, connection in enumerate(ranks)}
    results: dict[int, Any] = {}
    failures: dict[int, Failure] = {}
    while waiting := [c for c, rank in numbers.items() if rank not in results and rank not in failures]:
        if failures and all(_is_stopped(ranks[connection]) for connection in waiting):
            break
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(waiting, left)
        if not ready and not failures:
            raise TimeoutError(
                _stacks({numbers[connection]: ranks[connection] for connection in waiting}, logs)
            )
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
                    deadline = time.monotonic() + grace_seconds
    if failures:
        raise RankError(failures, logs)
    return [results[rank] for rank in range(len(ranks))]


def _is_stopped(process: BaseProcess) -> bool:
    """Whether a signal has stopped it, so that it says nothing until another one lets it continue."""
    try:
        status = Path(f"/proc/{process.pid}/stat").read_text()
    except FileNotFoundError:
        return False  # it has ended
    return status.rpartition(")")[2].split()[0] == "T"


def _stacks(silent: dict[int, BaseProcess], logs: Path) -> str:
    """The ends of the logs of ranks that do not answer, to which they add what they wait for."""
    for rank, process in silent.items():
        # A rank that has no log yet has no handler either: the signal would end it.
        if process.pid is not None and _log(logs, rank).exists():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(_DUMP_SECONDS)
    return "\n".join(_end_of_log(logs, rank) for rank in silent)


def _log(logs: Path, rank: int) -> Path:
    return logs / f"{rank}.log"


def _end_of_log(logs: Path, rank: int) -> str:
    log = _log(logs, rank)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join([f"--- end of the log of rank {rank}", *lines[-_LOG_LINES:]])


# On the ranks.

_send: Callable[[str, Any], None] = lambda kind, value: None  # noqa: E731 - replaced on a rank


def report(value: Any) -> None:
    """Sends ``value`` to the process that started this rank, whose ``on_report`` gets it."""
    _send("report", value)


def _serve(work: Callable[[], Any], settings: dict[str, str], connection: Connection, log: Path) -> None:
    """What a process does: works, answers, and is ended by the one that started it."""
    global _send
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
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
        reason = ". ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        answer = "failure", Failure(reason, traceback.format_exc())
    send(*answer)
    sys.stdout.flush()
    os._exit(0)  # engines must not drain at exit: their peers may be gone


def _end_with_parent(connection: Connection) -> None:
    """Ends a rank whose starter is gone, even if it hangs. The starter sends nothing."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
