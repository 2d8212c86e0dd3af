"""What travels between layers and stages."""

import torch
from torch import Tensor

Hidden = Tensor | tuple[Tensor, ...]
"""What travels between layers: a tensor, or a tuple of which the floating-point ones have gradients."""

Gradients = tuple[Tensor, ...]
"""One gradient for every floating-point tensor of a ``Hidden``."""


def detached(hidden: Hidden) -> Hidden:
    """The same values without history."""
    return hidden.detach() if isinstance(hidden, Tensor) else tuple(tensor.detach() for tensor in hidden)


def leaves(hidden: Hidden) -> Hidden:
    """The same values without history; the floating-point ones are to have gradients."""
    hidden = detached(hidden)
    for tensor in floats(hidden):
        tensor.requires_grad_()
    return hidden


def floats(hidden: Hidden) -> tuple[Tensor, ...]:
    """The tensors of ``hidden`` that have gradients."""
    tensors = (hidden,) if isinstance(hidden, Tensor) else hidden
    return tuple(tensor for tensor in tensors if tensor.is_floating_point())


def or_zeros(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    """``gradient``, or zeros if nothing depends on ``tensor``."""
    return torch.zeros_like(tensor) if gradient is None else gradient
