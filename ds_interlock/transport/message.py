"""What a message between stages looks like: a frame of fixed size, and payloads, the tensors not in it.

    frame   ┌ header ─────────────────────────────┬ small tensors ────────────────┬ mark ┐
            │ batch, kind, micro-batch, losses,   │ labels, masks; on a CPU also  │      │
            │ structures, and of every tensor     │ small hidden states, one      │      │
            │ its dtype, offset, and shape        │ after the other               │      │
            └─────────────────────────────────────┴───────────────────────────────┴──────┘
    then each payload by itself, straight from and into its own memory

A receiver can wait for a frame before it knows what is in it. Shapes may therefore change between
micro-batches, a neighbour that runs another schedule is noticed at once, and a small message is one transfer.
The mark arrives last, so that a receiver can see without waiting whether a frame is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_interlock.errors import PeerError
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.stage.hidden import DTYPES
from ds_interlock.transport.host import on_host, to_device

_HEADER_WORDS = 256
_HEADER_BYTES = 8 * _HEADER_WORDS
FRAME_BYTES = 16 * 1024
_ALIGNMENT = 16
_MARK = FRAME_BYTES - 1

_KINDS = [Kind.RECV_FORWARD, Kind.RECV_GRADIENT, Kind.RECV_COPY]
# A structure of tensors: how many, and whether they stand alone, in a tuple, or are none.
_NOTHING, _ALONE, _TUPLE = range(3)
# Where a tensor is, if it is not in the frame.
_LATER = -1


@dataclass(frozen=True)
class Contents:
    """What a frame says, and holds, of its message."""

    tensors: list[Tensor | None]
    """Those in the frame; None for payloads."""
    shapes: list[list[int]]
    dtypes: list[torch.dtype]
    layout: list[tuple[int, int]]
    """How the tensors make up structures."""

    def structures(self, payloads: Sequence[Tensor], device: torch.device) -> list[Any]:
        """The structures as they were sent, on ``device``, from the tensors in the frame and the payloads."""
        following = iter(payloads)
        reader = iter([next(following) if t is None else to_device(t, device) for t in self.tensors])
        structures: list[Any] = []
        for form, count in self.layout:
            parts = tuple(next(reader) for _ in range(count))
            structures.append(None if form == _NOTHING else parts[0] if form == _ALONE else parts)
        return structures

    def empty(self, device: torch.device) -> list[Tensor]:
        """Memory for the payloads."""
        return [
            torch.empty(shape, dtype=dtype, device=device)
            for tensor, shape, dtype in zip(self.tensors, self.shapes, self.dtypes, strict=True)
            if tensor is None
        ]


def encode(
    receive: Action, batch: int, structures: Sequence[Any], *, floats_inline: bool
) -> tuple[Tensor, list[Tensor]]:
    """The frame of a message for ``receive``, and the payloads to send after it.

    ``structures`` are tensors: alone, in a tuple, or None. Small ones travel in the frame if their values are
    in the host's memory: integers, and with ``floats_inline`` others.
    """
    layout: list[int] = [len(structures)]
    tensors: list[Tensor] = []
    for structure in structures:
        is_tensor = isinstance(structure, Tensor)
        parts = [structure] if is_tensor else list(structure or ())
        layout += [_NOTHING if structure is None else _ALONE if is_tensor else _TUPLE, len(parts)]
        tensors += [part.detach().contiguous() for part in parts]
    words = [*_tag(receive, batch), *layout]
    # Filled as an array: a small assignment costs a tenth of what it costs a tensor.
    frame = np.empty(FRAME_BYTES, dtype=np.uint8)
    frame[_MARK] = 1
    end = _HEADER_BYTES
    payloads = []
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        may_be_inline = floats_inline or not (tensor.is_floating_point() or tensor.is_complex())
        values = on_host(tensor) if may_be_inline and end + num_bytes <= _MARK else None
        offset = _LATER if values is None else end
        words += [DTYPES.index(tensor.dtype), offset, tensor.dim(), *tensor.shape]
        if values is None:
            payloads.append(tensor)
        else:
            frame[end : end + num_bytes] = as_bytes(values).numpy()
            end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    if len(words) > _HEADER_WORDS:
        raise ValueError(
            f"a message of {len(tensors)} tensors does not fit its header: send fewer, larger ones"
        )
    frame[:_HEADER_BYTES].view(np.int64)[: len(words)] = words
    return torch.from_numpy(frame), payloads


def empty_frame() -> Tensor:
    """Memory for a frame, without its mark."""
    frame = np.empty(FRAME_BYTES, dtype=np.uint8)
    frame[_MARK] = 0
    return torch.from_numpy(frame)


def has_arrived(frame: Tensor) -> bool:
    """Whether the last byte of ``frame`` is there: a wait for it will return at once."""
    return bool(frame.numpy()[_MARK])


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: backends transfer bytes of every type, and few types."""
    return tensor.reshape(-1).view(torch.uint8)


def decode(frame: Tensor, receive: Action, batch: int, sender: str) -> Contents:
    """What ``frame`` holds; PeerError if it is not the message that ``receive`` of ``batch`` expects."""
    words = frame.numpy()[:_HEADER_BYTES].view(np.int64).tolist()
    expected = _tag(receive, batch)
    if words[: len(expected)] != expected:
        sent = Action(receive.stage, _KINDS[words[1]], words[2], tuple(words[4 : 4 + words[3]]))
        raise PeerError(
            f"{sender} sent {sent} of batch {words[0]} where {receive} of batch {batch} was expected: the "
            "ranks run different schedules. Do all have the same configuration and call train_batch and "
            "eval_batch in the same order?"
        )
    reader = iter(words[len(expected) :])
    contents = Contents([], [], [], [(next(reader), next(reader)) for _ in range(next(reader))])
    for _ in range(sum(count for _, count in contents.layout)):
        dtype, offset = DTYPES[next(reader)], next(reader)
        shape = [next(reader) for _ in range(next(reader))]
        contents.dtypes.append(dtype)
        contents.shapes.append(shape)
        contents.tensors.append(None if offset == _LATER else _inside(frame, offset, dtype, shape))
    return contents


def _tag(receive: Action, batch: int) -> list[int]:
    kind = _KINDS.index(receive.kind)
    return [batch, kind, receive.micro_batch, len(receive.losses), *receive.losses]


def _inside(frame: Tensor, offset: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """For itself, so that autograd does not take a change of one tensor for a change of all in the frame."""
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    return torch.from_numpy(frame.numpy()[offset : offset + num_bytes]).view(dtype).view(shape)
