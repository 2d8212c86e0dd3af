"""Cross-entropy of language model outputs, also straight from hidden states, without all logits at once.

    labels_n ────────────────────────────────────────┐
    hidden_nd ── rows 0..r ──► logits_rv ──► loss, gradient of logits_rv ──► added to the gradients of
              ── rows r..2r ─► logits_rv ──► ...     (in place)              hidden, weight and bias

A vocabulary's logits are the largest tensor of a language model: 50,000 float32 numbers, 200 kB, for every
position, and as much again for their gradient. ``linear_cross_entropy`` holds those of a few hundred
positions at a time. It computes gradients in the forward pass, while a chunk's logits exist.

Shape suffixes: n positions, r positions of a chunk, d hidden width, v output (vocabulary) entry.
"""

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_interlock.heads.labels import IGNORED_LABEL

CHUNK_BYTES = 2**26
"""What the logits of one chunk may take; with 50,000 outputs in float32, those of 335 positions."""

_ACCELERATOR_CHUNK_BYTES = 2**28

Backend: TypeAlias = Literal["full", "chunked"]


def cross_entropy_sum(logits_nv: Tensor, labels_n: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropy over the labels that are not ``IGNORED_LABEL``.

    Half precision is too coarse for a log-softmax over a vocabulary: it is computed in float32 at least.
    ``label_smoothing`` is the share of the target that is divided evenly among the outputs.
    """
    return F.cross_entropy(
        logits_nv.to(wide(logits_nv.dtype)),
        labels_n,
        ignore_index=IGNORED_LABEL,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def linear_cross_entropy(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    bias_v: Tensor | None,
    labels_n: Tensor,
    label_smoothing: float = 0.0,
    *,
    backend: Backend | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """``cross_entropy_sum(F.linear(hidden_nd, weight_vd, bias_v), labels_n)`` in bounded memory.

    The numbers are the same to rounding. What does not require a gradient gets none computed. Unless all
    logits fit into one chunk (of ``chunk_bytes``), gradients can be taken once, and not differentiated again.
    """
    device = hidden_nd.device.type
    if torch.is_autocast_enabled(device):  # which does not reach into an autograd function
        dtype = torch.get_autocast_dtype(device)
        hidden_nd, weight_vd = hidden_nd.to(dtype), weight_vd.to(dtype)
        bias_v = None if bias_v is None else bias_v.to(dtype)
    rows = rows_of_a_chunk(hidden_nd, weight_vd.shape[0], chunk_bytes)
    backend = backend or ("full" if len(hidden_nd) <= rows else "chunked")
    if not torch.is_grad_enabled():  # autograd functions ask tensors, not the mode, what needs a gradient
        hidden_nd, weight_vd = hidden_nd.detach(), weight_vd.detach()
        bias_v = None if bias_v is None else bias_v.detach()
    if backend == "full":
        return cross_entropy_sum(F.linear(hidden_nd, weight_vd, bias_v), labels_n, label_smoothing)
    chunked: Tensor = _ChunkedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_nd, weight_vd, bias_v, labels_n, label_smoothing, rows
    )
    return chunked


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


def rows_of_a_chunk(hidden_nd: Tensor, num_outputs: int, chunk_bytes: int | None) -> int:
    """How many rows of logits take ``chunk_bytes``; by default more on an accelerator, or it would idle."""
    usual = CHUNK_BYTES if hidden_nd.device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    return max(1, (chunk_bytes or usual) // (num_outputs * wide(hidden_nd.dtype).itemsize))


def wide(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 if it is less precise."""
    return torch.promote_types(dtype, torch.float32)


class _ChunkedLinearCrossEntropy(GradientsInForward):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor | None,
        labels_n: Tensor,
        label_smoothing: float,
        rows: int,
    ) -> Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        total = hidden_nd.new_zeros((), dtype=wide(hidden_nd.dtype))
        hidden_gradient = torch.empty_like(hidden_nd) if of_hidden else None
        weight_gradient = bias_gradient = None
        for start in range(0, max(1, len(hidden_nd)), rows):  # without positions, gradients are zeros
            hidden_rd, labels_r = hidden_nd[start : start + rows], labels_n[start : start + rows]
            logits_rv = F.linear(hidden_rd, weight_vd, bias_v)
            loss, gradient_rv = _loss_and_gradient(logits_rv, labels_r, label_smoothing)
            del logits_rv
            total += loss
            # Zeroed here, where it is d numbers a row and not v.
            counted_r1 = (labels_r != IGNORED_LABEL).unsqueeze(1).to(hidden_rd.dtype)
            if hidden_gradient is not None:
                hidden_gradient[start : start + rows] = (gradient_rv @ weight_vd) * counted_r1
            if of_weight:
                weight_gradient = _add_product(weight_gradient, gradient_rv.T, hidden_rd * counted_r1)
            if of_bias:
                bias_gradient = _add_product(bias_gradient, gradient_rv.T, counted_r1)
        ctx.gradients = (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight_vd.dtype),
            None if bias_gradient is None else bias_gradient.squeeze(1).to(weight_vd.dtype),
            *(None, None, None),
        )
        return total


def _loss_and_gradient(logits_rv: Tensor, labels_r: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed loss, and its gradient by ``logits_rv`` but for ignored rows, which are not zeroed."""
    num_outputs = logits_rv.shape[1]
    counted_r = labels_r != IGNORED_LABEL
    target_r1 = labels_r.where(counted_r, 0).unsqueeze(1)
    log_probability_rv = F.log_softmax(logits_rv, -1, dtype=wide(logits_rv.dtype))
    loss_r = log_probability_rv.gather(1, target_r1).squeeze(1) * (label_smoothing - 1)
    if label_smoothing:
        loss_r -= label_smoothing * log_probability_rv.mean(1)
    gradient_rv = log_probability_rv.exp_()
    if label_smoothing:
        gradient_rv -= label_smoothing / num_outputs
    gradient_rv.scatter_add_(1, target_r1, gradient_rv.new_full(target_r1.shape, label_smoothing - 1))
    return loss_r.where(counted_r, 0).sum(), gradient_rv.to(logits_rv.dtype)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right``, summed in float32 at least; in place."""
    if total is None:
        return (left @ right).to(wide(left.dtype))
    if total.dtype == left.dtype:
        return torch.addmm(total, left, right, out=total)
    return total.add_(left @ right)
