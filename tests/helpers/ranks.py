"""A pool of ranks: processes of one job that stay up over many tests.

Importing DeepSpeed and meeting in a process group takes longer than most tests. So that is done
once, and the ranks then run one function after another:

    pytest ── run(function, **kwargs) ──►  rank 0 ─┐
           ── the same ─────────────────►  rank 1 ─┼─ one gloo job
           ── the same ─────────────────►  rank 2 ─┘
           ◄── [result, result, result]

The ranks are forks of a server that has imported DeepSpeed, so new ones cost little. The function must
be importable: defined at the top of a module. What it prints (DeepSpeed prints a lot) goes to a log per
rank; a rank that dies or hangs shows the end of its log. A rank that raises, dies or does not answer in
time makes ``run`` raise; the ranks may then be out of step with each other, so the next ``run`` starts
new ones.
"""

import faulthandler
import gc
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

START_SECONDS = 300.0
"""For the server to import DeepSpeed and the ranks to meet. A broken start raises long before."""

ANSWER_SECONDS = 240.0
"""How long a function may take; only a hanging one ever does. Longer than the engines' own limits."""

GRACE_SECONDS = 5.0
"""How long the other ranks may take to answer once one has failed: they may be waiting for it."""

END_SECONDS = 5.0
"""How long a rank without work may take to end (it may have to write what it covered)."""

_PRELOADED = [
    "deepspeed",
    "torch._dynamo",
    "torch.distributed.pipelining",
    "ds_interlock.engine.initialize",
    "ds_interlock.jobs.finetune",
    "ds_interlock.jobs.train_lm",
    "ds_interlock.jobs.train_resnet",
    "families",
    "hypothesis",
    "pandas",
    "pytest",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "gemma2", "bert")),
]
"""What ranks need, so that one process imports it and not every rank. ``datasets`` is not here: it starts a
thread, and a process with threads is not to be forked."""

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


def start_server() -> None:
    """Starts the server from which this process's ranks are forked; ``run_local_ranks`` uses it too."""
    get_context("forkserver").set_forkserver_preload(_PRELOADED)
    forkserver.ensure_running()


class RankPool:
    """Ranks of one gloo job. They start with the first ``run`` and end with ``close``.

    Args:
        num_ranks: World size.
        deepspeed: Whether the ranks import DeepSpeed and initialise its communication too.
    """

    def __init__(self, num_ranks: int, *, deepspeed: bool = True) -> None:
        self.num_ranks = num_ranks
        self.deepspeed = deepspeed
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Connection] = []
        self._logs: Path | None = None
        self._store: Any = None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *, within_seconds: float = ANSWER_SECONDS, **kwargs: Any
    ) -> list[Any]:
        """Calls ``function(**kwargs)`` on every rank.

        Returns:
            What it returned, by rank.

        Raises:
            RankError: If it failed on some rank.
        """
        results, failures = self._ask(_run_and_leave_groups, within_seconds, {"function": function, **kwargs})
        self._check(failures)
        return [results[rank] for rank in range(self.num_ranks)]

    def run_mortals(
        self, function: Callable[..., Any], *, within_seconds: float = ANSWER_SECONDS, **kwargs: Any
    ) -> dict[int, Any]:
        """As ``run``, for functions in which ranks end themselves: results of the others, by rank."""
        results, failures = self._ask(function, within_seconds, kwargs)
        self._check({rank: failure for rank, failure in failures.items() if failure.type_name != "Died"})
        self.close()
        return results

    def close(self, within_seconds: float = END_SECONDS) -> None:
        """Ends all processes: those that wait for work end by themselves, the others by force."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + within_seconds
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections, self._store = [], [], None
        if self._logs is not None:
            shutil.rmtree(self._logs)
            self._logs = None

    def _start(self) -> None:
        from torch.distributed import TCPStore

        self._logs = Path(tempfile.mkdtemp(prefix="ranks"))
        # The system picks the port when the store begins to listen: nothing can take it in between.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = {
            "WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # all ranks join our store, rank 0 opens none
            "TORCHELASTIC_RESTART_COUNT": "0",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        start_server()
        context = get_context("forkserver")
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            environment = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Daemons, so that an interrupted pytest does not wait for them.
            process = context.Process(target=serve, args=(theirs, environment, self._log(rank)), daemon=True)
            process.start()
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
            self.close(1.0)  # those that hang have had their time
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
                except (EOFError, OSError):
                    self._processes[rank].join()
                    answer = Failure("Died", f"exit status {self._processes[rank].exitcode}")
                (failures if isinstance(answer, Failure) else results)[rank] = answer
            if not ready:
                self._dump_stacks(list(waiting.values()))
                silent = Failure("NoAnswer", "in time; see its stacks")
                failures.update(dict.fromkeys(waiting.values(), silent))
        return results

    def _dump_stacks(self, ranks: list[int]) -> None:
        for rank in ranks:
            if pid := self._processes[rank].pid:
                os.kill(pid, signal.SIGUSR1)
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


def serve(connection: Connection, environment: dict[str, str], log: Path) -> None:
    """Calls what the pool asks for until it closes the connection."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    # Every engine makes process groups, every group connections; all stay open.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    num_modules = 0
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            os._exit(0)  # engines left by failed tests must not drain at exit
        connection.send_bytes(_answer(request))
        gc.collect()
        if len(sys.modules) > num_modules:  # modules stay: no later collection need look at them
            gc.freeze()
            num_modules = len(sys.modules)


def _die_with(parent: int) -> None:
    """A pool that was killed leaves no ranks behind, even if they hang."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _answer(request: bytes) -> bytes:
    try:
        function, kwargs = pickle.loads(request)
        return pickle.dumps(function(**kwargs))
    except Exception as error:  # noqa: BLE001 - raised again where the test runs
        return pickle.dumps(Failure(type(error).__name__, str(error), traceback.format_exc()))


def _run_and_leave_groups(function: Callable[..., Any], **kwargs: Any) -> Any:
    """Calls ``function(**kwargs)``, and leaves all process groups but the first.

    DeepSpeed makes a dozen for every engine, and each polls its connections for as long as it lives:
    after some tests the ranks would do nothing else.
    """
    from deepspeed.runtime.pipe import p2p
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.utils import groups as deepspeed_groups
    from torch import distributed as dist

    result = function(**kwargs)
    for engine in (thing for thing in gc.get_objects() if issubclass(type(thing), PipelineEngine)):
        # DeepSpeed's hooks on the losses of the last stage hold their engine, in a circle through autograd
        # that Python does not collect; and an engine that lives keeps its groups and their threads.
        engine.loss = None
        for buffers in engine.pipe_buffers.values():
            buffers.clear()
    engine = p2p._grid = None
    gc.collect()  # engines that the function has left end while their groups exist
    dist.barrier()  # until no rank needs them any more
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    for remembered in ("_WORLD_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "mpu"):
        setattr(deepspeed_groups, remembered, None)
    return result


def _join_job(deepspeed: bool) -> None:
    import torch

    torch.set_num_threads(1)
    if deepspeed:
        import ds_interlock

        ds_interlock.init_distributed(dist_backend="gloo")
    else:
        torch.distributed.init_process_group("gloo")
