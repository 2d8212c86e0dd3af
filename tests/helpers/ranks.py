"""A pool of ranks: processes of one job that stay up over many tests.

Importing DeepSpeed and meeting in a process group takes longer than most tests. So that is done
once, and the ranks then carry out one function after another:

    pytest ── run(function, **kwargs) ──►  rank 0 ─┐
           ── the same ─────────────────►  rank 1 ─┼─ one gloo job, DeepSpeed imported
           ── the same ─────────────────►  rank 2 ─┘
           ◄── [result, result, result]

The function must be importable: defined at the top of a module. What it prints (DeepSpeed prints a
lot) goes to a log a rank, of which a rank that dies or hangs shows the end. A rank that raises, dies
or does not answer in time makes ``run`` raise; the ranks may then be out of step with each other, so
the next ``run`` starts new ones.
"""

import faulthandler
import gc
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from ds_interlock.transport.local_ranks import free_port

START_SECONDS = 120.0
"""For processes to start and import DeepSpeed, on a machine with more to do."""

GRACE_SECONDS = 5.0
"""How long the other ranks may take to answer once one has failed: they may be waiting for it."""

_LOG_LINES = 40


@dataclass(frozen=True)
class Failure:
    """Why a rank gave no result.

    Attributes:
        type_name: Name of the exception's class; "Died" or "NoAnswer" if there was no exception.
        message: The exception's message.
        traceback: The rank's traceback, as text; empty if there was no exception.
    """

    type_name: str
    message: str
    traceback: str = ""


class RankError(AssertionError):
    """A function failed on some rank. ``failures`` says on which, and why."""

    def __init__(self, failures: dict[int, Failure], logs: dict[int, str]) -> None:
        self.failures = failures
        parts = []
        shown: dict[tuple[str, str], int] = {}
        for rank, failure in failures.items():
            first = shown.setdefault((failure.type_name, failure.message), rank)
            text = f"{failure.message}\n{failure.traceback}" if first == rank else f"as rank {first}"
            parts.append(f"rank {rank}: {failure.type_name}: {text}")
        parts += [f"--- end of the log of rank {rank}\n{log}" for rank, log in logs.items()]
        super().__init__("\n".join(parts))


class RankPool:
    """Ranks of one gloo job. They start with the first ``run`` and end with ``close``.

    Args:
        num_ranks: World size.
        deepspeed: Whether the ranks import DeepSpeed and initialise its communication too.
    """

    def __init__(self, num_ranks: int, *, deepspeed: bool = True) -> None:
        self.num_ranks = num_ranks
        self.deepspeed = deepspeed
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._logs: Path | None = None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *, within_seconds: float = 90.0, **kwargs: Any) -> list[Any]:
        """Calls ``function(**kwargs)`` on every rank.

        Returns:
            What it returned, by rank.

        Raises:
            RankError: If it failed on some rank.
        """
        results, failures = self._ask(function, within_seconds, kwargs)
        self._check(failures)
        return [results[rank] for rank in range(self.num_ranks)]

    def run_mortals(
        self, function: Callable[..., Any], *, within_seconds: float = 90.0, **kwargs: Any
    ) -> dict[int, Any]:
        """As ``run``, for functions in which ranks end themselves: results of the others, by rank."""
        results, failures = self._ask(function, within_seconds, kwargs)
        self._check({rank: failure for rank, failure in failures.items() if failure.type_name != "Died"})
        self.close()
        return results

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._logs is not None:
            shutil.rmtree(self._logs)
            self._logs = None

    def _start(self) -> None:
        self._logs = Path(tempfile.mkdtemp(prefix="ranks"))
        job = {
            "WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        for rank in range(self.num_ranks):
            ours, theirs = Pipe()
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", f"import ranks; ranks.serve({theirs.fileno()})"],
                    env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                )
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        _, failures = self._exchange(_join_job, START_SECONDS, {"deepspeed": self.deepspeed})
        self._check(failures)

    def _ask(
        self, function: Callable[..., Any], within_seconds: float, kwargs: dict[str, Any]
    ) -> tuple[dict[int, Any], dict[int, Failure]]:
        if not self._processes:
            self._start()
        return self._exchange(function, within_seconds, kwargs)

    def _exchange(
        self, function: Callable[..., Any], within_seconds: float, kwargs: dict[str, Any]
    ) -> tuple[dict[int, Any], dict[int, Failure]]:
        """What every rank answers: a result or a failure."""
        request = pickle.dumps((function, kwargs))
        failures: dict[int, Failure] = {}
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(request)
            except OSError:
                failures[rank] = Failure("Died", "before the call")
        return self._collect(time.monotonic() + within_seconds, failures), failures

    def _check(self, failures: dict[int, Failure]) -> None:
        """Raises if there are failures, and ends the ranks: they may be out of step with each other."""
        if failures:
            logs = {rank: self._end_of_log(rank) for rank, f in failures.items() if not f.traceback}
            self.close()
            raise RankError(dict(sorted(failures.items())), logs)

    def _collect(self, deadline: float, failures: dict[int, Failure]) -> dict[int, Any]:
        """One answer a rank; whoever gives none is added to ``failures``, with its stacks in its log."""
        results: dict[int, Any] = {}
        while waiting := {
            connection: rank
            for rank, connection in enumerate(self._connections)
            if rank not in results and rank not in failures
        }:
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0.0))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    answer = Failure("Died", f"exit status {self._processes[rank].wait()}")
                (failures if isinstance(answer, Failure) else results)[rank] = answer
            if not ready:
                self._dump_stacks(list(waiting.values()))
                silent = Failure("NoAnswer", "in time; see its stacks")
                failures.update(dict.fromkeys(waiting.values(), silent))
        return results

    def _dump_stacks(self, ranks: list[int]) -> None:
        for rank in ranks:
            self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.5)

    def _log(self, rank: int) -> Path:
        assert self._logs is not None
        return self._logs / f"rank_{rank}.log"

    def _end_of_log(self, rank: int) -> str:
        return "\n".join(self._log(rank).read_text(errors="replace").splitlines()[-_LOG_LINES:])


def caught(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception | None:
    """What ``function`` raises, None if it raises nothing: for tests of errors on ranks."""
    try:
        function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - to be looked at by the test
        return error
    return None


# On the ranks.


def serve(file_descriptor: int) -> None:
    """Calls what the pool asks for until it closes the connection."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    # Every engine makes process groups, every group connections; all stay open.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connection = Connection(file_descriptor)
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            os._exit(0)  # engines left by failed tests must not drain at exit
        connection.send_bytes(_answer(request))
        gc.collect()


def _die_with(parent: int) -> None:
    """A pool that was killed leaves no ranks behind, even if they hang."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _answer(request: bytes) -> bytes:
    try:
        function, kwargs = pickle.loads(request)
        result = pickle.dumps(function(**kwargs))
        _leave_groups()
        return result
    except Exception as error:  # noqa: BLE001 - raised again where the test runs
        return pickle.dumps(Failure(type(error).__name__, str(error), traceback.format_exc()))


def _leave_groups() -> None:
    """Leaves all process groups but the first.

    DeepSpeed makes a dozen for every engine, and each polls its connections for as long as it lives:
    after some tests the ranks would do nothing else.
    """
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.utils import groups as deepspeed_groups
    from torch import distributed as dist

    dist.barrier()  # until nobody needs them any more
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    for remembered in ("_WORLD_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "mpu"):
        setattr(deepspeed_groups, remembered, None)


def _join_job(deepspeed: bool) -> None:
    import torch

    torch.set_num_threads(1)
    if deepspeed:
        import ds_interlock

        ds_interlock.init_distributed(dist_backend="gloo")
    else:
        torch.distributed.init_process_group("gloo")
