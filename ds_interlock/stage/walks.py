"""Whether the graph of a layer may be walked back more than once, as relays do.

Some fused kernels save memory: their backward pass overwrites what the forward saved. A second walk then
computes with what the first has left, and autograd does not notice.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_interlock.stage.hidden import Hidden, copied, detached, floats, leaves
from ds_interlock.stage.recomputation import BuffersKept

_LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
_HALF_LIMIT = 1e-2  # of other types; kernels that add atomically vary by less


def modules_of(layers: Iterable[Any]) -> list[nn.Module]:
    """The modules that ``layers`` call: themselves, or those that a partial has (a tied layer's)."""
    parts = [part for layer in layers for part in (layer, *getattr(layer, "args", ()))]
    return [part for part in parts if isinstance(part, nn.Module)]


def compare_walks(
    layer: Callable[[Hidden], Hidden], hidden: Hidden, modules: Sequence[nn.Module]
) -> tuple[Hidden, float, str]:
    """Compares a layer's gradients from one walk with those of two more: of inputs, then of parameters.

    ``.grad``, buffers and ``hidden`` stay as they are. ``modules`` are what ``layer`` calls.

    Returns:
        The layer's output; the largest difference between gradients, by norm, relative to what is allowed
        (up to 1 is rounding); the names of the layer's own autograd functions, such as fused kernels.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    with torch.enable_grad(), BuffersKept(modules):
        inputs = leaves(hidden)
        output = layer(copied(inputs))
    ends = [tensor for tensor in floats(output) if tensor.requires_grad]
    starts = [tensor for tensor in floats(inputs) if tensor.requires_grad]
    if not ends:
        return output, 0.0, ""
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(end.shape, generator=generator).to(end) for end in ends]
    walk: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = partial(
        torch.autograd.grad, ends, grad_outputs=cotangents, retain_graph=True, materialize_grads=True
    )
    first = [gradient.clone() for gradient in walk([*starts, *parameters])]
    try:
        again = [gradient for some in (starts, parameters) if some for gradient in walk(some)]
    except (RuntimeError, AttributeError):  # autograd has noticed; or what was saved is gone
        again = [gradient + torch.inf for gradient in first]
    errors = [_error(*pair) for pair in zip(again, first, strict=True)]
    return detached(output), max(errors, default=0.0), ", ".join(_own_functions(ends))


def _error(actual: Tensor, expected: Tensor) -> float:
    if not expected.isfinite().all():
        return 0.0  # there is nothing to compare with
    limit = _LIMITS.get(expected.dtype, _HALF_LIMIT)
    wide = torch.promote_types(expected.dtype, torch.float64)
    difference = (actual.to(wide) - expected.to(wide)).norm() / limit
    relative = (difference / expected.to(wide).norm()).item() if difference else 0.0
    return relative if relative < torch.inf else torch.inf


def _own_functions(outputs: Sequence[Tensor]) -> list[str]:
    """The autograd functions in the graph of ``outputs`` that are written in Python, without torch's own."""
    names, seen = set(), set()
    left: list[Any] = [output.grad_fn for output in outputs]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [function for function, _ in node.next_functions]
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and not function.__module__.startswith("torch."):
            names.add(function.__name__)
    return sorted(names)
