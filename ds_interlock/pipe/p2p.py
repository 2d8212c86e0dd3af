"""Messages between neighbouring stages: one process group for each direction, asynchronous, bounded.

    stage k                                                     stage k+1
    Sender  ── forward group:  header, activations, labels ──►  Receiver
    Receiver ◄── gradient group: header, gradients ───────────  Sender

Activations and gradients never queue behind each other. A send returns at once and is waited for
only when ``SEND_AHEAD`` later ones have been started. A receive is *posted* when the program says so
and *taken* when the work needs it; in between, a thread of the receiver waits for it while the stage
computes, so that data moves during the work.

Every message starts with a header that says what it is and which tensors follow. Shapes may
therefore change from one micro-batch to the next, and a neighbour that runs another schedule is
noticed at once. A neighbour that died closes its connection; one that does not answer within
``interlock.timeout_seconds`` is given up. Either way the error names it.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_interlock.errors import PeerError
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.lower import receive_of
from ds_interlock.schedule.simulate import SEND_AHEAD

_HEADER_LENGTH = 256
_DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]
_KINDS = [Kind.RECV_FORWARD, Kind.RECV_GRADIENT]
# A structure of tensors: how many, and whether they stand alone, in a tuple, or there are none.
_NOTHING, _ALONE, _TUPLE = range(3)


@dataclass(frozen=True)
class Group:
    """The process groups of one direction.

    Attributes:
        payload: Moves tensors, on the backend of the device.
        header: Moves headers, always on the CPU.
    """

    payload: Any
    header: Any

    def destroy(self) -> None:
        """Frees its connections and threads."""
        for group in {id(group): group for group in (self.payload, self.header)}.values():
            dist.destroy_process_group(group)


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
        header = dist.new_group(backend="gloo", timeout=timeout)
        return Group(header if device.type == "cpu" else dist.new_group(timeout=timeout), header)

    return group(), group()


class Sender:
    """Sends to one neighbour, in order."""

    def __init__(self, group: Group, peer: Peer, timeout_seconds: float) -> None:
        self.group = group
        self.peer = peer
        self.timeout = timedelta(seconds=timeout_seconds)
        self._under_way: deque[tuple[list[Any], list[Tensor]]] = deque()

    def send(self, receive: Action, batch: int, *structures: Any) -> None:
        """Starts to send tensors (alone, in a tuple, or None) as what the action ``receive`` expects.

        Raises:
            PeerError: If the neighbour is gone, or has not taken an earlier message in time.
        """
        header, tensors = _encode(receive, batch, structures)
        with _named(self.peer, "sending to"):
            works = [dist.isend(header, self.peer.rank, group=self.group.header)]
            works += [dist.isend(t, self.peer.rank, group=self.group.payload) for t in tensors if t.numel()]
        # The buffers must live until they are on their way.
        self._under_way.append((works, [header, *tensors]))
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


class Receiver:
    """Receives from one neighbour, in the order in which receives are posted."""

    def __init__(self, group: Group, peer: Peer, device: torch.device, timeout_seconds: float) -> None:
        self.group = group
        self.peer = peer
        self.device = device
        self.timeout_seconds = timeout_seconds
        self._posted: queue.SimpleQueue[tuple[Action, int] | None] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[Callable[[], list[Any]] | BaseException] = queue.SimpleQueue()
        self._held: dict[Action, list[Any]] = {}
        self._order: deque[Action] = deque()
        self._thread: threading.Thread | None = None

    def post(self, receive: Action, batch: int) -> None:
        """Expects the message of ``receive`` next on this link."""
        if self._thread is None:
            # A daemon: a process that fails must not wait for a message that will never come.
            self._thread = threading.Thread(target=self._listen, name=f"from {self.peer}", daemon=True)
            self._thread.start()
        self._posted.put((receive, batch))
        self._order.append(receive)

    def take(self, receive: Action) -> list[Any]:
        """The structures sent for ``receive``; waits for them.

        Raises:
            PeerError: If the neighbour is gone, sends something else, or nothing in time.
        """
        while receive not in self._held:
            try:
                arrived = self._arrived.get(timeout=self.timeout_seconds)
            except queue.Empty:
                raise PeerError(
                    f"{self.peer} sent nothing for {self.timeout_seconds:g} s while {self._order[0]} was "
                    "due (interlock.timeout_seconds): it hangs, died, or is slower than that"
                ) from None
            if isinstance(arrived, BaseException):
                raise arrived
            with _named(self.peer, "receiving from"):
                self._held[self._order.popleft()] = arrived()
        return self._held.pop(receive)

    def close(self) -> None:
        """Ends the thread once all posted receives are complete."""
        self._posted.put(None)

    def _listen(self) -> None:
        while (posted := self._posted.get()) is not None:
            receive, batch = posted
            try:
                with _named(self.peer, "receiving from"):
                    self._arrived.put(self._receive(receive, batch))
            except PeerError as error:
                self._arrived.put(error)
                return

    def _receive(self, receive: Action, batch: int) -> Callable[[], list[Any]]:
        """Receives a header and what it announces; the result is fetched by whoever takes it."""
        header = torch.empty(_HEADER_LENGTH, dtype=torch.int64)
        _wait(dist.irecv(header, self.peer.rank, group=self.group.header))
        shapes, dtypes, layout = _decode(header.tolist(), receive, batch, self.peer)

        def payload() -> list[Any]:
            tensors = [
                torch.empty(shape, dtype=dtype, device=self.device)
                for shape, dtype in zip(shapes, dtypes, strict=True)
            ]
            works = [
                dist.irecv(tensor, self.peer.rank, group=self.group.payload)
                for tensor in tensors
                if tensor.numel()
            ]
            for work in works:
                _wait(work)
            return _arrange(tensors, layout)

        if self.device.type == "cpu":
            structures = payload()
            return lambda: structures
        # An accelerator orders its transfers by the stream of the thread that asks for them.
        return payload


class Links:
    """The links of one stage: to and from the stage in front of it and the one behind it.

    Every rank of the job must make its links at the same point.

    Args:
        ranks: The ranks of this pipeline, by stage.
        stage: This stage.
        device: Where tensors are received to.
        timeout_seconds: After how long a silent neighbour is given up.
    """

    def __init__(
        self, ranks: Sequence[int], stage: int, device: torch.device, timeout_seconds: float
    ) -> None:
        self._groups = forward, gradient = new_groups(device, timeout_seconds)
        self._senders: dict[Kind, Sender] = {}
        self._receivers: dict[Kind, Receiver] = {}
        if stage > 0:
            front = Peer(ranks[stage - 1], stage - 1)
            self._receivers[Kind.RECV_FORWARD] = Receiver(forward, front, device, timeout_seconds)
            self._senders[Kind.SEND_GRADIENT] = Sender(gradient, front, timeout_seconds)
        if stage + 1 < len(ranks):
            behind = Peer(ranks[stage + 1], stage + 1)
            self._senders[Kind.SEND_FORWARD] = Sender(forward, behind, timeout_seconds)
            self._receivers[Kind.RECV_GRADIENT] = Receiver(gradient, behind, device, timeout_seconds)

    def send(self, send: Action, batch: int, *structures: Any) -> None:
        """Starts the send action ``send``; see ``Sender.send``."""
        self._senders[send.kind].send(receive_of(send), batch, *structures)

    def post(self, receive: Action, batch: int) -> None:
        """Expects the message of ``receive`` next on its link."""
        self._receivers[receive.kind].post(receive, batch)

    def take(self, receive: Action) -> list[Any]:
        """The structures sent for ``receive``; see ``Receiver.take``."""
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


class _named:  # noqa: N801 - reads as a statement
    """Turns whatever a process group raises into a PeerError that names the neighbour."""

    def __init__(self, peer: Peer, doing: str) -> None:
        self.peer, self.doing = peer, doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, PeerError):
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            # The neighbour's own error is the one to read, not the way this one came about.
            raise PeerError(
                f"{self.doing} {self.peer} failed; it has most likely stopped: see its own error ({detail})"
            ) from None


def _wait(work: Any) -> None:
    assert work is not None, "a rank of the group always gets work to wait for"
    work.wait()


def _encode(receive: Action, batch: int, structures: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
    """The header, and the tensors in the order they follow it."""
    tensors: list[Tensor] = []
    layout: list[int] = [len(structures)]
    for structure in structures:
        parts = [structure] if isinstance(structure, Tensor) else list(structure or ())
        layout += [
            _NOTHING if structure is None else _ALONE if isinstance(structure, Tensor) else _TUPLE,
            len(parts),
        ]
        tensors += [part.detach().contiguous() for part in parts]
    words = [*_tag(receive, batch), *layout]
    for tensor in tensors:
        words += [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    if len(words) > _HEADER_LENGTH:
        raise ValueError(
            f"a message of {len(tensors)} tensors does not fit its header: send fewer, larger ones"
        )
    return torch.tensor(words + [0] * (_HEADER_LENGTH - len(words)), dtype=torch.int64), tensors


def _tag(receive: Action, batch: int) -> list[int]:
    kind = _KINDS.index(receive.kind)
    return [batch, kind, receive.micro_batch, len(receive.losses), *receive.losses]


def _decode(
    words: list[int], receive: Action, batch: int, peer: Peer
) -> tuple[list[list[int]], list[torch.dtype], list[tuple[int, int]]]:
    """Shapes, dtypes and structures; fails if the message is not the one expected."""
    expected = _tag(receive, batch)
    if words[: len(expected)] != expected:
        sent = Action(receive.stage, _KINDS[words[1]], words[2], tuple(words[4 : 4 + words[3]]))
        raise PeerError(
            f"{peer} sent {sent} of batch {words[0]} where {receive} of batch {batch} was expected: the "
            "ranks run different schedules. Do all have the same configuration and call train_batch and "
            "eval_batch in the same order?"
        )
    reader = iter(words[len(expected) :])
    layout = [(next(reader), next(reader)) for _ in range(next(reader))]
    shapes, dtypes = [], []
    for _ in range(sum(count for _, count in layout)):
        dtypes.append(_DTYPES[next(reader)])
        shapes.append([next(reader) for _ in range(next(reader))])
    return shapes, dtypes, layout


def _arrange(tensors: list[Tensor], layout: list[tuple[int, int]]) -> list[Any]:
    """Puts the tensors back into the structures they were sent in."""
    reader = iter(tensors)
    structures: list[Any] = []
    for form, count in layout:
        parts = tuple(next(reader) for _ in range(count))
        structures.append(None if form == _NOTHING else parts[0] if form == _ALONE else parts)
    return structures
