"""How far a head is from the base model: its outputs, in bounded memory; and the hidden state that it reads.

    base_nd ──── rows 0..r ──► unembed ──► log p_rv ─┐
    hidden_nd ── rows 0..r ──► unembed ──► log q_rv ─┴► sum of p (log p - log q) ──► gradient of the rows

As in the chunked cross-entropy (``cross_entropy.py``) a few hundred positions at a time are computed, and
their gradient with them, in the forward pass.

Shape suffixes: n positions, r positions of a chunk, d hidden width, v output (vocabulary) entry.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_interlock.heads.cross_entropy import GradientsInForward, rows_of_a_chunk, wide

Unembed = Callable[[Tensor], Tensor]


def kl_divergence(
    hidden_nd: Tensor, base_nd: Tensor, unembed: Unembed, num_outputs: int, *, chunk_bytes: int | None = None
) -> Tensor:
    """Sum over positions of KL(softmax(unembed(base)) || softmax(unembed(hidden))).

    Gradients reach ``hidden_nd`` alone, and can be taken once. ``unembed`` turns ``[r, d]`` into ``[r, v]``,
    each position by itself, with frozen weights. ``chunk_bytes`` limits both sets of outputs of one chunk.
    """
    rows = rows_of_a_chunk(hidden_nd, 2 * num_outputs, chunk_bytes)
    if not torch.is_grad_enabled():  # autograd functions ask tensors, not the mode, what needs a gradient
        hidden_nd = hidden_nd.detach()
    inputs = (hidden_nd, base_nd.detach(), unembed, rows)
    total: Tensor = _ChunkedDivergence.apply(*inputs)  # type: ignore[no-untyped-call]
    return total


def relative_error(hidden_nd: Tensor, base_nd: Tensor) -> Tensor:
    """Sum over positions of |hidden - base|^2 / |base|^2, in float32 at least.

    A position whose states are equal to rounding counts 0 and has no gradient: Adam would turn rounding
    errors into whole steps.
    """
    eps = torch.finfo(hidden_nd.dtype).eps
    hidden_nd, base_nd = (states_nd.to(wide(hidden_nd.dtype)) for states_nd in (hidden_nd, base_nd))
    error_n = (hidden_nd - base_nd).square().sum(-1) / base_nd.square().sum(-1).clamp(min=eps)
    return error_n[error_n > eps].sum()


class _ChunkedDivergence(GradientsInForward):
    @staticmethod
    def forward(ctx: Any, hidden_nd: Tensor, base_nd: Tensor, unembed: Unembed, rows: int) -> Tensor:
        total = hidden_nd.new_zeros((), dtype=wide(hidden_nd.dtype))
        gradient_nd = torch.empty_like(hidden_nd) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_nd), rows):
            chunk = slice(start, start + rows)
            log_p_rv = _log_probabilities(unembed(base_nd[chunk]))
            with torch.set_grad_enabled(gradient_nd is not None):
                hidden_rd = hidden_nd[chunk].detach().requires_grad_(gradient_nd is not None)
                log_q_rv = _log_probabilities(unembed(hidden_rd))
                loss = F.kl_div(log_q_rv, log_p_rv, reduction="sum", log_target=True)
            if gradient_nd is not None:
                (gradient_nd[chunk],) = torch.autograd.grad(loss, hidden_rd)
            total += loss.detach()
        ctx.gradients = (gradient_nd, None, None, None)
        return total


def _log_probabilities(outputs_rv: Tensor) -> Tensor:
    return F.log_softmax(outputs_rv, -1, dtype=wide(outputs_rv.dtype))
