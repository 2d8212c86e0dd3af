"""What each layer of a model costs: timed on the device at hand, or counted in floating-point operations.

A layer is run by itself, with the arguments it was called with in the whole model. Both ways of
measuring walk it in the same four passes:

    forward          layer(*inputs)
    input gradient   d output / d input alone, as a relay computes it
    backward         d output / d input and weights, as the pass W computes it
    optimizer        one step of its parameters

and note what the forward keeps for the backward passes.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ds_interlock.planning.profile import HeadProfile, LayerProfile

Meter = Callable[[Callable[[], Any]], float]
"""Runs a piece of work and says how many seconds it takes."""

MakeOptimizer = Callable[[list[Tensor]], Any]
"""Makes the optimizer of some parameters."""

_BYTES_PER_PARAMETER_AND_STEP = 28
"""Adam in float32: weight, gradient and two moments read, three of them written."""


@dataclass(frozen=True)
class LayerCall:
    """A layer and what the model called it with.

    Attributes:
        name: Of the layer, for people.
        module: The layer.
        inputs: Positional arguments; the first floating-point tensor is the hidden state.
        options: Keyword arguments.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


class Stopwatch:
    """A meter that times on the device: the median of several runs after one that is not counted.

    Args:
        synchronize: Waits for the device.
        num_runs: Runs that count.
    """

    def __init__(self, synchronize: Callable[[], None], num_runs: int = 5) -> None:
        self.synchronize = synchronize
        self.num_runs = num_runs

    def __call__(self, work: Callable[[], Any]) -> float:
        """Median seconds of ``work``."""
        work()
        self.synchronize()
        seconds = []
        for _ in range(self.num_runs):
            start = time.perf_counter()
            work()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


class FlopMeter:
    """A meter for tensors on the meta device: floating-point operations over an assumed speed.

    Args:
        flops_per_second: What the device is taken to reach, not its peak.
    """

    def __init__(self, flops_per_second: float) -> None:
        self.flops_per_second = flops_per_second

    def __call__(self, work: Callable[[], Any]) -> float:
        """Seconds that the matrix products and attention of ``work`` would take."""
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops()) / self.flops_per_second


def profile_layer(call: LayerCall, meter: Meter, optimizer: MakeOptimizer | None) -> LayerProfile:
    """The costs of one layer.

    Args:
        call: The layer and its inputs, on the device to measure on.
        meter: A ``Stopwatch`` or a ``FlopMeter``.
        optimizer: Makes the optimizer of a list of parameters; None to leave the step out.
    """
    inputs = tuple(_as_leaf(value) for value in call.inputs)
    options = {name: _as_leaf(value) for name, value in call.options.items()}
    hidden = [v for v in (*inputs, *options.values()) if isinstance(v, Tensor) and v.requires_grad]
    parameters = [p for p in call.module.parameters() if p.requires_grad]

    def forward() -> Tensor:
        return first_tensor(call.module(*inputs, **options))

    forward_seconds = meter(forward)
    with _kept_bytes([*call.module.parameters(), *call.module.buffers()]) as kept:
        output = forward()
    gradient = torch.ones_like(output)
    relay_seconds = backward_seconds = 0.0
    if hidden:
        relay_seconds = meter(
            lambda: torch.autograd.grad(output, hidden, gradient, retain_graph=True, allow_unused=True)
        )
    if parameters:
        both = [*parameters, *hidden]
        backward_seconds = meter(
            lambda: torch.autograd.backward(output, gradient, retain_graph=True, inputs=both)
        )
    return LayerProfile(
        name=call.name,
        forward_seconds=forward_seconds,
        input_gradient_seconds=relay_seconds,
        weight_gradient_seconds=max(0.0, backward_seconds - relay_seconds),
        optimizer_seconds=optimizer_seconds(parameters, meter, optimizer),
        num_parameters=sum(p.numel() for p in parameters),
        activation_bytes=sum(kept.values()),
        output_bytes=_size(output),
    )


def profile_head(
    head: nn.Module,
    loss: Callable[[Tensor], Tensor],
    hidden: Tensor,
    meter: Meter,
    optimizer: MakeOptimizer | None,
    head_type: str,
) -> HeadProfile:
    """The cost of one auxiliary head: forward, and backward to its weights and its input.

    Args:
        head: The head, for its parameters.
        loss: From a hidden state to the head's loss.
        hidden: A hidden state as it arrives there.
        meter: See ``profile_layer``.
        optimizer: See ``profile_layer``.
        head_type: Its ``interlock.head.type``.
    """
    leaf = hidden.detach().requires_grad_()
    parameters = [p for p in head.parameters() if p.requires_grad]
    seconds = meter(lambda: loss(leaf).backward())  # type: ignore[no-untyped-call]
    return HeadProfile(
        type=head_type,
        seconds=seconds,
        optimizer_seconds=optimizer_seconds(parameters, meter, optimizer),
        num_parameters=sum(p.numel() for p in parameters),
    )


def optimizer_seconds(parameters: Sequence[Tensor], meter: Meter, optimizer: MakeOptimizer | None) -> float:
    """Time of one optimizer step; from the bytes it moves if nothing runs."""
    if not parameters:
        return 0.0
    if isinstance(meter, FlopMeter):
        moved = _BYTES_PER_PARAMETER_AND_STEP * sum(p.numel() for p in parameters)
        return moved / (meter.flops_per_second / FLOPS_PER_BYTE)
    if optimizer is None:
        return 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    seconds = meter(optimizer(list(parameters)).step)
    for parameter in parameters:
        parameter.grad = None
    return seconds


FLOPS_PER_BYTE = 100
"""Assumed where nothing is measured: operations a device does in the time its memory moves a byte."""


def first_tensor(value: Any) -> Tensor:
    """The hidden state among what a layer returns."""
    first = value[0] if isinstance(value, tuple | list) else value
    assert isinstance(first, Tensor), f"a layer returns a tensor, not {type(first).__name__}"
    return first


def _as_leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach()
        return value.requires_grad_() if value.is_floating_point() else value
    return value


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _kept_bytes(weights: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Notes the size of every storage that is kept for the backward pass, ``weights`` left out."""
    left_out = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, int] = {}
    held = []  # a storage that is freed may come back under the same number

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            kept[storage._cdata] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept
