"""What travels between layers and stages."""

from collections.abc import Callable

import torch
from torch import Tensor

Hidden = Tensor | tuple[Tensor, ...]
"""What travels between layers: a tensor, or a tuple of which the floating-point ones have gradients."""

Gradients = tuple[Tensor, ...]
"""One gradient for every floating-point tensor of a ``Hidden``."""


def detached(hidden: Hidden) -> Hidden:
    """The same values without history."""
    return _map(hidden, torch.Tensor.detach)


def leaves(hidden: Hidden) -> Hidden:
    """The same values without history; the floating-point ones are to have gradients."""
    return _map(hidden, _leaf)


def floats(hidden: Hidden) -> tuple[Tensor, ...]:
    """The tensors of ``hidden`` that have gradients."""
    tensors = (hidden,) if isinstance(hidden, Tensor) else hidden
    return tuple(tensor for tensor in tensors if tensor.is_floating_point())


def or_zeros(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    """``gradient``, or zeros if nothing depends on ``tensor``."""
    return torch.zeros_like(tensor) if gradient is None else gradient


def _map(hidden: Hidden, function: Callable[[Tensor], Tensor]) -> Hidden:
    if isinstance(hidden, Tensor):
        return function(hidden)
    return tuple(function(tensor) for tensor in hidden)


def _leaf(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor
