"""Between the host's memory and the device's, without a wait for the device."""

from typing import NamedTuple

import torch
from torch import Tensor


class _HostCopy(NamedTuple):
    values: Tensor
    version: int


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which is the host's, on ``device``; on an accelerator a copy, once its stream gets there.

    The values of integers are remembered on the host.
    """
    if device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    moved = pinned.to(device, non_blocking=True)
    return moved if moved.is_floating_point() or moved.is_complex() else with_host_copy(moved, pinned)


def with_host_copy(tensor: Tensor, values: Tensor) -> Tensor:
    """``tensor`` itself; remembers ``values`` as its values, until it is changed in place."""
    tensor.untyped_storage().host_copy = _HostCopy(values, tensor._version)  # type: ignore[attr-defined]
    return tensor


def on_host(tensor: Tensor) -> Tensor | None:
    """The values of a contiguous ``tensor`` in the host's memory; None if only the device has them."""
    if tensor.device.type == "cpu":
        return tensor
    kept: _HostCopy | None = getattr(tensor.untyped_storage(), "host_copy", None)
    is_whole = kept is not None and (tensor.shape, tensor.dtype) == (kept.values.shape, kept.values.dtype)
    return kept.values if kept is not None and is_whole and tensor._version == kept.version else None
