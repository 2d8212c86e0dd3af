"""Messages between neighbouring stages: one process group for each direction, asynchronous, bounded.

    stage k                                                  stage k+1
    Sender   ── forward group: activations and labels ──►  Receiver
    Receiver ◄── gradient group: gradients ──────────────  Sender

A send returns at once and is waited for only when ``SEND_AHEAD`` later ones have been started. A receive is
*posted* when the program says so and *taken* when the work needs it; in between, its frame moves while the
stage computes. On a link whose messages have tensors after the frame, a thread waits for frames, so that
these tensors move during the work too. A neighbour that died, is silent for ``interlock.timeout_seconds``,
or runs another schedule raises an error that names it.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_interlock.errors import PeerError
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.dependency import receive_of
from ds_interlock.schedule.simulate import SEND_AHEAD
from ds_interlock.transport.message import FRAME_BYTES, as_bytes, decode, encode

CLOSE_SECONDS = 5.0
"""How long to wait for a thread at the end."""

_NO_LIMIT = timedelta(0)  # to torch.distributed
_NUM_TAGS = 2**16


@dataclass(frozen=True)
class Group:
    """The process groups of one direction: for frames, always in the CPU's memory, and for large tensors."""

    frame: Any
    payload: Any

    @property
    def is_one(self) -> bool:
        """True if tensors are in the CPU's memory, as frames are."""
        return self.frame is self.payload

    def destroy(self) -> None:
        dist.destroy_process_group(self.frame)
        if not self.is_one:
            dist.destroy_process_group(self.payload)


@dataclass(frozen=True)
class Peer:
    """The rank at the other end, and how errors call it."""

    rank: int
    stage: int

    def __str__(self) -> str:
        return f"stage {self.stage} (rank {self.rank})"


def new_groups(device: torch.device, timeout_seconds: float) -> tuple[Group, Group]:
    """The forward and the gradient group. Every rank of the job must call this at the same point."""
    # Longer than our own limit: the error that names the neighbour is the one to be seen.
    timeout = timedelta(seconds=2 * timeout_seconds + 60)

    def group() -> Group:
        frame = dist.new_group(backend="gloo", timeout=timeout)
        return Group(frame, frame if device.type == "cpu" else dist.new_group(timeout=timeout))

    return group(), group()


class Sender:
    """Sends to one neighbour, in order."""

    def __init__(self, group: Group, peer: Peer, timeout_seconds: float) -> None:
        self.group = group
        self.peer = peer
        self.timeout = timedelta(seconds=timeout_seconds)
        self._num_sent = 0
        # With their buffers, which must live until they are on their way.
        self._under_way: deque[tuple[list[Any], list[Tensor]]] = deque()

    def send(self, receive: Action, batch: int, *structures: Any) -> None:
        """Starts to send tensors (alone, in a tuple, or None) as what the action ``receive`` expects."""
        frame, tensors = encode(receive, batch, structures, inline=self.group.is_one)
        with _named(self.peer, "sending to"):
            works = [dist.isend(frame, self.peer.rank, group=self.group.frame)]
            works += [
                dist.isend(as_bytes(t), self.peer.rank, group=self.group.payload, tag=_tag(self._num_sent))
                for t in tensors
                if t.numel()
            ]
        self._num_sent += 1
        self._under_way.append((works, [frame, *tensors]))
        while len(self._under_way) > SEND_AHEAD:
            self._wait_for_oldest()

    def flush(self) -> None:
        """Waits until everything has been received."""
        while self._under_way:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        works, _ = self._under_way.popleft()
        with _named(self.peer, "sending to"):
            for work in works:
                work.wait(self.timeout)


@dataclass(frozen=True)
class _Expected:
    """A message that a receive is posted for, and the frame that it arrives in."""

    receive: Action
    batch: int
    number: int
    frame: Tensor
    work: Any
    in_background: bool


class Receiver:
    """Receives from one neighbour, in the order in which receives are posted."""

    def __init__(self, group: Group, peer: Peer, device: torch.device, timeout_seconds: float) -> None:
        self.group = group
        self.peer = peer
        self.device = device
        self.timeout_seconds = timeout_seconds
        self._num_posted = 0
        self._order: deque[_Expected] = deque()
        self._held: dict[Action, list[Any]] = {}
        self._has_more_tensors = True  # the newest message; of the first nothing is known
        self._listener: threading.Thread | None = None
        self._handed_over: queue.SimpleQueue[_Expected | None] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[list[Any] | BaseException] = queue.SimpleQueue()

    def post(self, receive: Action, batch: int) -> None:
        """Expects the message of ``receive`` next on this link."""
        frame = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        with _named(self.peer, "receiving from"):
            work = dist.irecv(frame, self.peer.rank, group=self.group.frame)
        # An accelerator orders its transfers by the stream of the thread that asks for them.
        in_background = self._has_more_tensors and self.group.is_one
        expected = _Expected(receive, batch, self._num_posted, frame, work, in_background)
        self._num_posted += 1
        self._order.append(expected)
        if in_background:
            self._listen_for(expected)

    def take(self, receive: Action) -> list[Any]:
        """Waits for what is sent for ``receive``; PeerError if something else is, or nothing in time."""
        while receive not in self._held:
            expected = self._order[0]
            self._held[expected.receive] = self._wait_for(expected)
            self._order.popleft()
        return self._held.pop(receive)

    def close(self) -> None:
        """Ends the thread, unless a failure has left it waiting for what will never come."""
        self._handed_over.put(None)
        if self._listener is not None and not self._order:
            self._listener.join(CLOSE_SECONDS)

    def _wait_for(self, expected: _Expected) -> list[Any]:
        start = time.monotonic()
        try:
            if not expected.in_background:
                return self._receive(expected, timedelta(seconds=self.timeout_seconds))
            arrived = self._arrived.get(timeout=self.timeout_seconds)
        except (queue.Empty, PeerError) as error:
            if isinstance(error, PeerError) and time.monotonic() - start < self.timeout_seconds:
                raise
            raise PeerError(
                f"{self.peer} sent nothing for {self.timeout_seconds:g} s while {expected.receive} was "
                "due (interlock.timeout_seconds): it hangs, died, or is slower than that"
            ) from None
        if isinstance(arrived, BaseException):
            raise arrived
        return arrived

    def _receive(self, expected: _Expected, timeout: timedelta = _NO_LIMIT) -> list[Any]:
        """Waits for a frame, and receives what it announces."""
        with _named(self.peer, "receiving from"):
            expected.work.wait(timeout)
            contents = decode(expected.frame, expected.receive, expected.batch, str(self.peer))
            tensors = contents.empty(self.device)
            works: list[Any] = [
                dist.irecv(as_bytes(t), self.peer.rank, group=self.group.payload, tag=_tag(expected.number))
                for t in tensors
                if t.numel()
            ]
            for work in works:
                # An accelerator's stream waits, not this process; with a limit, the process would.
                work.wait(timeout if self.group.is_one else _NO_LIMIT)
        self._has_more_tensors = bool(tensors)
        return contents.structures(tensors)

    def _listen_for(self, expected: _Expected) -> None:
        if self._listener is None:
            # A daemon: a process that fails must not wait for a message that will never come.
            self._listener = threading.Thread(target=self._listen, name=f"from {self.peer}", daemon=True)
            self._listener.start()
        self._handed_over.put(expected)

    def _listen(self) -> None:
        while (expected := self._handed_over.get()) is not None:
            try:
                self._arrived.put(self._receive(expected))
            except PeerError as error:
                self._arrived.put(error)
                return


class Links:
    """The links of ``stage`` to and from its neighbours in ``ranks``, which are the pipeline's, by stage.

    Every rank of the job must make its links at the same point. Tensors are received to ``device``.
    """

    def __init__(
        self, ranks: Sequence[int], stage: int, device: torch.device, timeout_seconds: float
    ) -> None:
        self._groups = forward, gradient = new_groups(device, timeout_seconds)
        self._senders: dict[Kind, Sender] = {}
        self._receivers: dict[Kind, Receiver] = {}
        if stage > 0:
            previous = Peer(ranks[stage - 1], stage - 1)
            self._receivers[Kind.RECV_FORWARD] = Receiver(forward, previous, device, timeout_seconds)
            self._senders[Kind.SEND_GRADIENT] = Sender(gradient, previous, timeout_seconds)
        if stage + 1 < len(ranks):
            next_peer = Peer(ranks[stage + 1], stage + 1)
            self._senders[Kind.SEND_FORWARD] = Sender(forward, next_peer, timeout_seconds)
            self._receivers[Kind.RECV_GRADIENT] = Receiver(gradient, next_peer, device, timeout_seconds)

    def send(self, send: Action, batch: int, *structures: Any) -> None:
        """See ``Sender.send``."""
        self._senders[send.kind].send(receive_of(send), batch, *structures)

    def post(self, receive: Action, batch: int) -> None:
        """See ``Receiver.post``."""
        self._receivers[receive.kind].post(receive, batch)

    def take(self, receive: Action) -> list[Any]:
        """See ``Receiver.take``."""
        return self._receivers[receive.kind].take(receive)

    def flush(self) -> None:
        """Waits until everything sent has been received."""
        for sender in self._senders.values():
            sender.flush()

    def close(self) -> None:
        """Ends the receiving threads and the process groups. Every rank must close its links."""
        for receiver in self._receivers.values():
            receiver.close()
        for group in self._groups:
            group.destroy()


@contextmanager
def _named(peer: Peer, doing: str) -> Iterator[None]:
    """Turns whatever a process group raises into a PeerError that names the neighbour."""
    try:
        yield
    except PeerError:
        raise
    except RuntimeError as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        # The neighbour's own error is the one to read, not the way this one came about.
        raise PeerError(
            f"{doing} {peer} failed; it has most likely stopped: see its own error ({detail})"
        ) from None


def _tag(number: int) -> int:
    """Distinguishes the tensors after one frame from those after the next, and from frames."""
    return 1 + number % _NUM_TAGS
