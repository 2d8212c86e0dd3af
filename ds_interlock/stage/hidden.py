"""What layers return, what of it travels between stages, and to whom it belongs (docs/design.md, 4)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree

from ds_interlock.errors import ConfigError

Hidden = Any
"""What a layer returns: tensors in any structure; between stages a tensor or a tuple of tensors."""

Gradients = tuple[Tensor, ...]
"""One gradient for each tensor of ``floats(hidden)``."""

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.complex128, torch.complex64, torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
"""What travels between stages."""


def detached(hidden: Hidden) -> Hidden:
    """The same values without history."""
    return _map(Tensor.detach, hidden)


def settled(hidden: Hidden, inputs: Hidden) -> Hidden:
    """The same values without history, in memory that nobody writes to while a send still reads it.

    By the time it is gone, the layer may have filled a buffer of its own again (as CUDA graphs do), an
    optimizer changed a parameter that the layer returned or a view of it, or a kernel overwritten what it
    saved. None of them reaches what an operator of torch has allocated for its result, or ``inputs``, whose
    memory is this micro-batch's. Everything else is copied: what has no history (so all that a frozen stage
    or an evaluation computes), functions written in Python or C++, what was changed in place, and views of
    such.
    """

    def settle(tensor: Tensor) -> Tensor:
        values = tensor.detach()
        is_safe = _allocated_by_torch(tensor) or _memory(tensor) in map(_memory, _tensors(inputs))
        return values if is_safe else values.clone()

    return _map(settle, hidden)


def unshared(gradient: Tensor) -> Tensor:
    """The same ``.grad``, in memory of its own.

    Autograd may give an input and a parameter views of one memory. What it adds to the parameter's ``.grad``
    for the next micro-batch would change the input's, while it is sent or before it is used.
    """
    return gradient.clone() if _users(gradient) > _ONE_USER else gradient


def apart(gradients: Gradients, others: Iterable[Tensor]) -> Gradients:
    """The same ``gradients``, in other memory than ``others``, a view of which may become a ``.grad``."""
    memories = set(map(_memory, others))
    return tuple(gradient.clone() if _memory(gradient) in memories else gradient for gradient in gradients)


def copied(values: Any) -> Any:
    """The same values in memory of their own, with their history."""
    return _map(Tensor.clone, values)


def leaves(hidden: Hidden) -> Hidden:
    """The same values without history; those of ``floats(hidden)`` are to have gradients."""
    return _map(lambda tensor: tensor.detach().requires_grad_(_has_gradient(tensor)), hidden)


def owned(hidden: Hidden) -> Hidden:
    """The same values in the same memory, of which nobody else needs the values any more.

    Autograd forbids to change a leaf in place, and permits it for these.
    """
    return _map(_Owned.apply, hidden)


class _Owned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def floats(hidden: Hidden) -> tuple[Tensor, ...]:
    """The tensors of ``hidden`` that have gradients: of a floating-point type, or complex with a history."""
    return tuple(filter(_has_gradient, _tensors(hidden)))


def check_travels(hidden: Hidden, layer: int) -> None:
    """Refuses what cannot travel, or would lose its gradient on the way, from ``layer`` to the next stage."""
    parts = hidden if isinstance(hidden, tuple) else (hidden,)
    for part in parts:
        if not isinstance(part, Tensor):
            problem = f"a {type(part).__name__}" + (" in a tuple" if part is not hidden else "")
        elif part.dtype not in DTYPES or part.layout != torch.strided:
            problem = f"a tensor of {part.dtype}, {part.layout}"
        elif part.requires_grad and not _is_float(part):
            problem = f"a tensor of {part.dtype} that needs a gradient (see torch.view_as_real)"
        else:
            continue
        raise ConfigError(
            f"layer {layer}, the last one of its stage, returned {problem}: what goes to the next stage must "
            "be a tensor or a tuple of tensors, of which those of floating-point types have gradients; "
            "change what the layer returns, or cut the model elsewhere"
        )


def _tensors(hidden: Hidden) -> list[Tensor]:
    parts = [hidden] if isinstance(hidden, Tensor) else _pytree.tree_leaves(hidden)
    return [part for part in parts if isinstance(part, Tensor)]


def _allocated_by_torch(tensor: Tensor) -> bool:
    """Whether its memory is new, from one of torch's own operators, and was written once."""
    whole = tensor if tensor._base is None else tensor._base
    node = whole.grad_fn
    is_foreign = isinstance(node, BackwardCFunction) or type(node).__name__ == "CppFunction"
    return node is not None and not is_foreign and whole._version == 0


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _users(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_ONE_USER = _users(torch.empty(1))


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1  # of 8 bits: autograd cannot add them up


def _has_gradient(tensor: Tensor) -> bool:
    return _is_float(tensor) or (tensor.is_complex() and tensor.requires_grad)


def _map(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    if isinstance(values, Tensor):  # spares most calls the time of looking into structures
        return function(values)
    return _pytree.tree_map_only(Tensor, function, values)
