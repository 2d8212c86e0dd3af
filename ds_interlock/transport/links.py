"""Messages between neighbouring stages: headers control the flow, payloads follow in the same order.

    stage k                                                        stage k+1
    Sender   ── forward channel: frames, hidden states ─────────►  Receiver
    Receiver ◄── gradient channel: frames, gradients ────────────  Sender

A receive is *posted* when the program says so and *taken* when the work needs it. Posting receives the frame.
The payloads are received once the frame is there and this rank comes by, and at the latest when the message
is taken. A send returns at once; it waits only while more than ``SEND_AHEAD`` frames of its channel are under
way, and a frame is no longer so once the other end has posted its receive. No rank waits for a payload that
it sends. So ranks get as far as their programs do in a simulation with ``send_ahead=0``, and a payload waits
only for what makes it, and for earlier ones of its channel.

On an accelerator a receive is started on a stream that has nothing else to do, the work's stream waits for
its end, and no process does. A neighbour that died, is silent for ``interlock.timeout_seconds``, or runs
another schedule raises an error that names it.
"""

import time
from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_interlock.errors import PeerError
from ds_interlock.schedule.action import RECV_KINDS, SEND_KINDS, Action, Kind
from ds_interlock.schedule.dependency import receive_of
from ds_interlock.schedule.lower import RECEIVE_AHEAD
from ds_interlock.schedule.simulate import SEND_AHEAD
from ds_interlock.transport.communicator import Channel, Peer, open_channels
from ds_interlock.transport.message import Contents, as_bytes, decode, empty_frame, encode, has_arrived


@dataclass(frozen=True)
class _Payloads:
    """Of one message under way, with their buffers, which must live until they are gone."""

    number: int
    works: list[Any]
    tensors: list[Tensor]

    @property
    def are_gone(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class Sender:
    """Sends to one neighbour, in order.

    ``receive_ahead`` is the most messages that the neighbour posts receives for before it takes the first.
    """

    def __init__(self, channel: Channel, timeout_seconds: float) -> None:
        self.channel = channel
        self.receive_ahead = RECEIVE_AHEAD
        self._timeout_seconds = timeout_seconds
        self._num_sent = 0
        self._frames: deque[tuple[Any, Tensor]] = deque()
        self._payloads: deque[_Payloads] = deque()

    def send(self, receive: Action, batch: int, *structures: Any) -> None:
        """Starts to send tensors (alone, in a tuple, or None) as what the action ``receive`` expects."""
        frame, tensors = encode(receive, batch, structures, floats_inline=self.channel.on_gloo)
        with _named(self.channel.peer, "sending to"):
            self._frames.append((self.channel.send_header(frame), frame))
            works = [self.channel.send_payload(as_bytes(tensor)) for tensor in tensors if tensor.numel()]
        if works:
            self._payloads.append(_Payloads(self._num_sent, works, tensors))
        self._num_sent += 1
        while len(self._frames) > SEND_AHEAD:
            self._wait_for_oldest_frame()
        self._let_go_of_payloads()

    def flush(self) -> None:
        """Waits until everything has been received. To be called between programs."""
        while self._frames:
            self._wait_for_oldest_frame()
        with _named(self.channel.peer, "sending to"):
            while self._payloads:
                self._payloads.popleft().wait()

    def _wait_for_oldest_frame(self) -> None:
        work, _ = self._frames.popleft()
        _wait(work, self._timeout_seconds, self.channel.peer, "sending to", "took nothing", "a message")

    def _let_go_of_payloads(self) -> None:
        """Drops the buffers of payloads that are gone.

        Gloo says so only to those who wait. But where a frame is, the message ``receive_ahead`` before it has
        been taken, and a wait for its payloads returns at once.
        """
        num_taken = self._num_sent - len(self._frames) - self.receive_ahead
        with _named(self.channel.peer, "sending to"):
            while self._payloads:
                oldest = self._payloads[0]
                if not (oldest.number < num_taken if self.channel.on_gloo else oldest.are_gone):
                    return
                if self.channel.on_gloo:
                    oldest.wait()
                self._payloads.popleft()


@dataclass
class _Expected:
    """A message that a receive is posted for, and, once its frame is there, what it consists of."""

    receive: Action
    batch: int
    frame: Tensor
    work: Any
    contents: Contents | None = None
    payloads: list[Tensor] = field(default_factory=list)
    works: list[Any] = field(default_factory=list)


class Receiver:
    """Receives from one neighbour, in the order in which receives are posted."""

    def __init__(self, channel: Channel, device: torch.device, timeout_seconds: float) -> None:
        self.channel = channel
        self.device = device
        self.timeout_seconds = timeout_seconds
        self._on_accelerator = device.type != "cpu"
        # Nothing is ever queued on it: what is started from it waits for no work.
        self._side_stream = get_accelerator().Stream(device) if self._on_accelerator else None
        self._order: deque[_Expected] = deque()
        self._held: dict[Action, list[Any]] = {}

    def post(self, receive: Action, batch: int) -> None:
        """Expects the message of ``receive`` next on this link."""
        frame = empty_frame()
        with _named(self.channel.peer, "receiving from"):
            self._order.append(_Expected(receive, batch, frame, self.channel.receive_header(frame)))

    def start_payloads(self) -> None:
        """Starts to receive what follows the frames that have come; waits for nothing."""
        for message in self._order:
            if message.contents is None:
                if not has_arrived(message.frame):
                    return
                self._start(message)

    def take(self, receive: Action) -> list[Any]:
        """Waits for what is sent for ``receive``; PeerError if something else is, or nothing in time."""
        while receive not in self._held:
            message = self._order[0]
            self._held[message.receive] = self._finish(message, message.contents or self._start(message))
            self._order.popleft()
        return self._held.pop(receive)

    def _start(self, message: _Expected) -> Contents:
        """Waits for a frame, and starts to receive what it announces."""
        self._wait_for_frame(message)
        contents = decode(message.frame, message.receive, message.batch, str(self.channel.peer))
        with _named(self.channel.peer, "receiving from"), get_accelerator().stream(self._side_stream):
            message.payloads = contents.empty(self.device)
            message.works = [self.channel.receive_payload(as_bytes(t)) for t in message.payloads if t.numel()]
        message.contents = contents
        return contents

    def _finish(self, message: _Expected, contents: Contents) -> list[Any]:
        """Waits for the payloads: on an accelerator the stream of the work does, not this process."""
        with _named(self.channel.peer, "receiving from"):
            for work in message.works:
                work.wait()  # with a limit, the process would wait
        if self._on_accelerator:
            for payload in message.payloads:  # their memory is the side stream's
                payload.record_stream(get_accelerator().current_stream())
        return contents.structures(message.payloads, self.device)

    def _wait_for_frame(self, message: _Expected) -> None:
        peer, due = self.channel.peer, str(message.receive)
        _wait(message.work, self.timeout_seconds, peer, "receiving from", "sent nothing", due)


class Links:
    """The links of ``stage`` to and from its neighbours in ``ranks``, which are the pipeline's, by stage.

    Neighbours must make their links at the same point. Tensors are received to ``device``, over what
    ``transport`` says (``interlock.transport``). ``copy_links``: see ``open_channels``.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        stage: int,
        device: torch.device,
        timeout_seconds: float,
        transport: str = "auto",
        copy_links: Container[int] = (),
    ) -> None:
        self.channels = open_channels(ranks, stage, device, timeout_seconds, transport, copy_links)
        self._senders = {
            kind: Sender(channel, timeout_seconds)
            for kind, channel in self.channels.items()
            if kind in SEND_KINDS | {Kind.SEND_COPY}
        }
        self._receivers = {
            kind: Receiver(channel, device, timeout_seconds)
            for kind, channel in self.channels.items()
            if kind in RECV_KINDS | {Kind.RECV_COPY}
        }

    def expect(self, receive_ahead: int) -> None:
        """Prepares for programs that post so many receives before they take the first (``Sender``)."""
        for sender in self._senders.values():
            sender.receive_ahead = max(sender.receive_ahead, receive_ahead)

    def send(self, send: Action, batch: int, *structures: Any) -> None:
        """See ``Sender.send``."""
        self._start_payloads()
        self._senders[send.kind].send(receive_of(send), batch, *structures)

    def send_copy(self, send: Action, batch: int, *structures: Any) -> None:
        """As ``send``, once the one before is gone: copies are large, and few are to be held."""
        self._senders[send.kind].flush()
        self.send(send, batch, *structures)

    def post(self, receive: Action, batch: int) -> None:
        """See ``Receiver.post``."""
        self._receivers[receive.kind].post(receive, batch)
        self._start_payloads()

    def take(self, receive: Action) -> list[Any]:
        """See ``Receiver.take``."""
        self._start_payloads()
        return self._receivers[receive.kind].take(receive)

    def flush(self) -> None:
        """Waits until everything sent has been received, and until the device has nothing left to do."""
        for sender in self._senders.values():
            sender.flush()
        get_accelerator().synchronize()

    def close(self) -> None:
        """Ends the communicators. Neighbours must have flushed before, or they lose what is under way."""
        while self.channels:
            self.channels.popitem()[1].close()

    def _start_payloads(self) -> None:
        for receiver in self._receivers.values():
            receiver.start_payloads()


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


def _wait(frame: Any, seconds: float, peer: Peer, doing: str, it: str, due: str) -> None:
    """Waits until ``frame`` is gone or there; PeerError if ``peer`` is, or does not answer in time."""
    start = time.monotonic()
    try:
        with _named(peer, doing):
            frame.wait(timedelta(seconds=seconds))
    except PeerError:
        if time.monotonic() - start < seconds:
            raise
        raise PeerError(
            f"{peer} {it} for {seconds:g} s while {due} was due (interlock.timeout_seconds): it hangs, "
            "died, or is slower than that"
        ) from None
