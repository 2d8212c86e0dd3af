"""Losses over a vocabulary, computed for some positions at a time, with their gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 2**26
"""What the logits of one chunk may take; with 50,000 outputs in float32, those of 335 positions."""


class GradientsInForward(torch.autograd.Function):
    """A sum whose gradients are computed in the forward pass, and can be taken once.

    ``forward`` sets ``ctx.gradients``: one for each of its arguments, or None.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a loss computed in chunks can be taken only once")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a copy of the weight's gradient would be as large as a chunk's logits, or larger.
        return tuple(None if gradient is None else gradient.mul_(scale) for gradient in gradients)


def wide(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 if it is less precise."""
    return torch.promote_types(dtype, torch.float32)
