"""Two-rank communicators: one for the headers and one for the payloads of each direction of each link.

    stage 0                    stage 1                    stage 2
       │ ── headers, payloads ──► │ ── headers, payloads ──► │     forward
       │ ◄── headers, payloads ── │ ◄── headers, payloads ── │     gradient
       │                          │ ◄── headers, payloads ── │     copy, from the first stage with a head on

Its two members make one by themselves, so their number at a stage does not grow with the pipeline. Not by
``dist.new_group``: every rank of the job would have to call it, or, under NCCL, to join a split of the
job's communicator. Headers are gloo's on every device. Payloads are NCCL's where tensors are on a GPU: there
unbatched messages of one communicator wait for each other, so no two directions or links may share one.
With ``interlock.transport`` "gloo" they go through the host's memory instead (``staging.py``).
"""

import os
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from ds_interlock.errors import ConfigError
from ds_interlock.schedule.action import Kind
from ds_interlock.transport.staging import Staged

SENDER, RECEIVER = 0, 1
"""Their ranks in every communicator."""

_QUEUES = 8  # CUDA's default without MPS

_num_opened: Counter[str] = Counter()
"""By direction: how often this rank has opened it. Its members agree on that, whatever other ranks do."""


@dataclass(frozen=True)
class Peer:
    """The rank at the other end, and how errors call it."""

    rank: int
    stage: int

    def __str__(self) -> str:
        return f"stage {self.stage} (rank {self.rank})"


@dataclass(frozen=True)
class Channel:
    """This rank's end of one direction of a link."""

    peer: Peer
    headers: Any
    payloads: Any
    on_gloo: bool = True
    """Whether payloads are gloo's, too: then only who waits for one learns that it is gone."""

    def send_header(self, frame: Tensor) -> Any:
        """Starts to send; the result's ``wait`` returns once the other end has posted a receive."""
        return self.headers.send([frame], RECEIVER, 0)

    def receive_header(self, frame: Tensor) -> Any:
        """Starts to receive into ``frame``."""
        return self.headers.recv([frame], SENDER, 0)

    def send_payload(self, payload: Tensor) -> Any:
        """Starts to send, once what the current stream has to do is done."""
        return self.payloads.send([payload], RECEIVER, 0)

    def receive_payload(self, payload: Tensor) -> Any:
        """Starts to receive, once what the current stream has to do is done."""
        return self.payloads.recv([payload], SENDER, 0)

    def close(self) -> None:
        """Ends the communicators, with all that is under way; waits for nobody."""
        self.headers.shutdown()
        # NCCL's own shutdown waits for the other end, and a rank that collects garbage may be alone in it.
        self.payloads.shutdown() if self.on_gloo else self.payloads.abort()


class Communicators:
    """Makes the communicators of a rank.

    Args:
        device: Where tensors are received to.
        timeout_seconds: Of a message; that of the communicators is longer.
        transport: ``interlock.transport``.
    """

    def __init__(self, device: torch.device, timeout_seconds: float, transport: str) -> None:
        self.device = device
        self._transport = transport
        # Longer than our own limit: the error that names the neighbour is the one to be seen.
        self._timeout = timedelta(seconds=2 * timeout_seconds + 60)
        self._gloo: Any = dist.ProcessGroupGloo
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        # One for all: it has a thread and some open files.
        self._sockets = (
            self._gloo.create_device(interface=interface) if interface else self._gloo.create_default_device()
        )

    def channel(self, name: str, peer: Peer, rank: int) -> Channel:
        """The end of ``rank``, SENDER or RECEIVER, of the direction ``name``. The two wait for each other."""
        store = PrefixStore(name, dist.distributed_c10d._get_default_store())
        headers = self.gloo(PrefixStore("headers", store), rank)
        payloads = self.payloads(PrefixStore("payloads", store), rank)
        channel = Channel(peer, headers, payloads, on_gloo=isinstance(payloads, self._gloo | Staged))
        # The first message of a NCCL communicator connects it, which would wait for both hosts.
        first = torch.zeros(1, dtype=torch.uint8, device=self.device)
        (channel.send_payload if rank == SENDER else channel.receive_payload)(first).wait()
        return channel

    def gloo(self, store: Any, rank: int) -> Any:
        """A communicator for tensors in the CPU's memory."""
        options = self._gloo._Options()
        options._devices, options._threads, options._timeout = [self._sockets], 1, self._timeout
        return self._gloo(store, rank, 2, options)

    def payloads(self, store: Any, rank: int) -> Any:
        """A communicator for tensors on the device."""
        if self.device.type == "cpu":
            return self.gloo(store, rank)
        if self._transport == "gloo":
            return Staged(self.gloo(store, rank))
        if get_accelerator().communication_backend_name() != "nccl":
            raise ConfigError(
                f'there is no NCCL between {self.device.type} devices: set interlock.transport to "gloo", '
                "which takes the host's memory"
            )
        check_queues(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", ""))
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = self._timeout
        return nccl(store, rank, 2, options)


def check_queues(number: str) -> None:
    """Refuses a CUDA with so few hardware queues that a send which waits holds up the stage's own work.

    A stage has a stream for its work and up to six for messages; streams share queues, which run in order.
    """
    if number.isdecimal() and int(number) < _QUEUES:
        raise ConfigError(
            f"CUDA_DEVICE_MAX_CONNECTIONS is {number}: stages may stand still over NCCL; unset it or give at "
            f'least {_QUEUES}, or set interlock.transport to "gloo"'
        )


def open_channels(
    ranks: Sequence[int],
    stage: int,
    device: torch.device,
    timeout_seconds: float,
    transport: str,
    copy_links: Container[int] = (),
) -> dict[Kind, Channel]:
    """The ends of this stage, by what it does there; ``ranks`` are the pipeline's, by stage.

    Of the links, which have the number of the stage before them, ``copy_links`` have a third direction.

    The other members must call it, too; no other rank has to.
    """
    communicators = Communicators(device, timeout_seconds, transport)
    channels: dict[Kind, Channel] = {}
    # Links of even stages first: then no stage waits for one that waits for another.
    for link in sorted({stage - 1, stage} & set(range(len(ranks) - 1)), key=lambda link: link % 2):
        downstream = link == stage
        other = link + 1 if downstream else link
        peer = Peer(ranks[other], other)
        upstream = ("gradient", "copy") if link in copy_links else ("gradient",)
        for direction in ("forward", *upstream):
            sends = downstream is (direction == "forward")
            name = f"ds_interlock/{ranks[link]}-{ranks[link + 1]}/{direction}"
            _num_opened[name] += 1
            channel = communicators.channel(
                f"{name}/{_num_opened[name]}", peer, SENDER if sends else RECEIVER
            )
            channels[_KINDS[direction, sends]] = channel
    get_accelerator().synchronize()
    return channels


_KINDS = {
    ("forward", True): Kind.SEND_FORWARD,
    ("forward", False): Kind.RECV_FORWARD,
    ("gradient", True): Kind.SEND_GRADIENT,
    ("gradient", False): Kind.RECV_GRADIENT,
    ("copy", True): Kind.SEND_COPY,
    ("copy", False): Kind.RECV_COPY,
}
