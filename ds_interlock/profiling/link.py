"""Latency and bandwidth between two stages: two processes play ping-pong over the engine's ``Links``."""

import os
import statistics
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_interlock.schedule.action import Action, Kind
from ds_interlock.transport.links import Links
from ds_interlock.transport.local_ranks import run_local_ranks

_NUM_TURNS = 30
_TIMEOUT_SECONDS = 60.0


def measure_link(num_bytes: int) -> tuple[float, float] | None:
    """Latency in seconds and bandwidth in bytes per second between two processes of this machine.

    ``num_bytes`` is the size of the large message, as of a hidden state. None on a machine with one
    accelerator only, which has no link to measure.
    """
    accelerator = get_accelerator()
    device = accelerator.device_name()
    if device != "cpu" and accelerator.device_count() < 2:
        return None
    small, large = run_local_ranks(partial(_play, num_bytes), 2, device=device)[0]
    return small, num_bytes / max(large - small, 1e-9)


def _play(num_bytes: int) -> tuple[float, float]:
    """On each of the two ranks: the seconds of a small and of a large message."""
    rank = int(os.environ["RANK"])
    accelerator = get_accelerator()
    device, backend = torch.device("cpu"), "gloo"
    if accelerator.device_name() != "cpu":
        device = torch.device(accelerator.device_name(rank))
        backend = accelerator.communication_backend_name()
        accelerator.set_device(rank)
    dist.init_process_group(backend, timeout=timedelta(seconds=_TIMEOUT_SECONDS))
    links = Links([0, 1], rank, device, _TIMEOUT_SECONDS)
    small = _one_way_seconds(links, rank, torch.zeros(1, device=device))
    large = _one_way_seconds(links, rank, torch.zeros(max(1, num_bytes // 4), device=device))
    dist.barrier()
    links.close()
    return small, large


def _one_way_seconds(links: Links, rank: int, message: torch.Tensor) -> float:
    """Half of the median time there and back."""
    seconds = []
    for turn in range(_NUM_TURNS):
        start = time.perf_counter()
        if rank == 0:
            links.post(Action(0, Kind.RECV_GRADIENT, 0), turn)
            links.send(Action(0, Kind.SEND_FORWARD, 0), turn, message)
            links.take(Action(0, Kind.RECV_GRADIENT, 0))
            get_accelerator().synchronize()
        else:
            links.post(Action(1, Kind.RECV_FORWARD, 0), turn)
            links.take(Action(1, Kind.RECV_FORWARD, 0))
            links.send(Action(1, Kind.SEND_GRADIENT, 0), turn, message)
        seconds.append(time.perf_counter() - start)
    links.flush()
    return statistics.median(seconds) / 2
