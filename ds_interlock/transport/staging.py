"""Payloads between devices through the host's memory: for clusters without NCCL, and ranks that share a GPU.

    device 0 ──copy──► pinned memory ──gloo──► pinned memory ──copy──► device 1

A sender's host waits for the device: gloo would send what is in the memory now. Nothing can come to a
standstill by that, since a device has only work whose inputs are there.
"""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


class Staged:
    """A communicator for tensors on the device, over ``gloo``, one for tensors in the host's memory."""

    def __init__(self, gloo: Any) -> None:
        self._gloo = gloo

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        """Starts to send, once what the current stream has to do is done."""
        buffers = [_pinned(tensor).copy_(tensor, non_blocking=True) for tensor in tensors]
        if any(tensor.device.type != "cpu" for tensor in tensors):
            get_accelerator().current_stream().synchronize()
        return _Work(self._gloo.send(buffers, peer, tag), buffers, [])

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        """Starts to receive; the tensors are complete for the stream that is current at ``wait``."""
        buffers = [_pinned(tensor) for tensor in tensors]
        return _Work(self._gloo.recv(buffers, peer, tag), buffers, tensors)

    def shutdown(self) -> None:
        """Ends it; the other end must do so, too."""
        self._gloo.shutdown()


class _Work:
    """Keeps ``buffers`` until it is done; then copies them to ``targets``, if there are any."""

    def __init__(self, work: Any, buffers: list[Tensor], targets: list[Tensor]) -> None:
        self._work, self._buffers, self._targets = work, buffers, targets

    def wait(self) -> None:
        self._work.wait()
        for buffer, target in zip(self._buffers, self._targets, strict=False):
            target.copy_(buffer, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    """Memory of the host like ``tensor``, which a device reads and writes by itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
