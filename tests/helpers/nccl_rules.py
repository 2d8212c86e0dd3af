"""A communicator with NCCL's rules, on CPUs: to see that the engine does not come to a standstill under them.

NCCL runs what is sent and received over a communicator one after the other, in the order of the calls, and a
transfer ends only once it is its turn at both ends. Gloo, underneath, knows no order. Integers travel with
the header here, and other tensors as payloads, as between GPUs. The host waits where a GPU's stream would.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_interlock.transport.communicator import Communicators


class Turn:
    """A transfer that waits for its turn."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self.start = start
        self.done = threading.Event()

    def wait(self) -> None:
        self.done.wait()

    def is_completed(self) -> bool:
        return self.done.is_set()


class Stream:
    """A thread that does one transfer after the other."""

    def __init__(self) -> None:
        self._turns: queue.SimpleQueue[Turn | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, start: Callable[[], Any]) -> Turn:
        turn = Turn(start)
        self._turns.put(turn)
        return turn

    def end(self) -> None:
        self._turns.put(None)

    def _work(self) -> None:
        while (turn := self._turns.get()) is not None:
            turn.start().wait()
            turn.done.set()


class NcclRules(dist.ProcessGroup):
    """Two ranks with NCCL's rules, over ``gloo``: there a send ends once the receive is posted."""

    def __init__(self, gloo: Any, rank: int) -> None:
        super().__init__(rank, 2)
        self.gloo = gloo
        self.stream = Stream()

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Turn:  # type: ignore[override]
        return self.stream.put(lambda: self.gloo.send(tensors, peer, tag))

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Turn:  # type: ignore[override]
        return self.stream.put(lambda: self.gloo.recv(tensors, peer, tag))

    def abort(self) -> None:
        self.stream.end()
        self.gloo.shutdown()


@contextmanager
def payloads_by(make: Callable[[Communicators, Any, int], Any]) -> Iterator[None]:
    """Within it, the links that are made have communicators for payloads by ``make``."""
    payloads = Communicators.payloads
    Communicators.payloads = make  # type: ignore[method-assign]
    try:
        yield
    finally:
        Communicators.payloads = payloads  # type: ignore[method-assign]


def nccl_rules() -> AbstractContextManager[None]:
    """Within it, the links that are made have payloads under NCCL's rules."""
    return payloads_by(lambda self, store, rank: NcclRules(self.gloo(store, rank), rank))
