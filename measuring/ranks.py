"""Runs a function on every rank of a gloo job, in processes that end with it.

Gloo's groups poll their connections for as long as their process lives, and DeepSpeed makes a dozen for
every engine: what is timed gets processes of its own. They are forked from a server that has imported
torch and DeepSpeed already, so that a job of eight starts in a second and not in twenty.

    run_ranks(work, 2, batches=8) ─► server ─fork─► rank 0: work(batches=8) ─┐
                                            ─fork─► rank 1: work(batches=8) ─┤
         [result of rank 0, of rank 1]  ◄────────────────────────────────────┘
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["deepspeed", "ds_interlock.engine.initialize", "torch.distributed.pipelining"]
_DIED = "the process died"
_GRACE_SECONDS = 1.0
_LOG_LINES = 40


def run_ranks(work: Callable[..., Any], num_ranks: int, **arguments: Any) -> list[Any]:
    """Calls ``work(**arguments)`` on ``num_ranks`` ranks, after process-group initialisation.

    Args:
        work: A function at the top of a module.
        num_ranks: World size.
        arguments: Picklable.

    Returns:
        What it returned, by rank.

    Raises:
        RuntimeError: If it failed on some rank; with that rank's traceback and the end of its log.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        port, processes, connections = _free_port(), [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
            log = Path(folder) / f"{rank}.log"
            process = context.Process(target=_serve, args=(work, arguments, settings, theirs, log))
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        try:
            return _collect(connections, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(connections: list[Connection], logs: Path) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while waiting := {c: rank for rank, c in enumerate(connections) if rank not in results}:
        # Once a rank has failed the others may complain of it, and have to be quick to be heard.
        ready = wait(list(waiting), _GRACE_SECONDS if failures else None)
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            try:
                failure, results[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                failure, results[rank] = _DIED, None
            if failure:
                failures[rank] = failure
        if failures and not ready:
            break
    if failures:
        # One that died is why the others failed, whoever was heard first.
        rank, failure = next((f for f in failures.items() if f[1] == _DIED), next(iter(failures.items())))
        end = "\n".join((logs / f"{rank}.log").read_text(errors="replace").splitlines()[-_LOG_LINES:])
        raise RuntimeError(f"rank {rank} failed\n{failure}\n--- end of its log\n{end}")
    return [results[rank] for rank in range(len(connections))]


def _serve(
    work: Callable[..., Any],
    arguments: dict[str, Any],
    settings: dict[str, int],
    connection: Connection,
    log: Path,
) -> None:
    """What a process does: joins the job, works, answers, and is ended by ``run_ranks``."""
    with log.open("w") as file:  # DeepSpeed prints a lot
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in settings.items()}, MASTER_ADDR="127.0.0.1")
    import torch

    import ds_interlock

    try:
        torch.set_num_threads(1)
        ds_interlock.init_distributed(dist_backend="gloo")
        answer = None, work(**arguments)
        torch.distributed.barrier()  # no rank leaves while others still send
    except Exception:  # noqa: BLE001 - raised again where the job was started
        answer = traceback.format_exc(), None
    connection.send_bytes(pickle.dumps(answer))  # not send: it would leave tensors behind in this process
    os._exit(0)  # engines must not drain at exit: their peers may be gone


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
