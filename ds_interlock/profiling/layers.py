"""What each layer of a model costs: timed on the device at hand, or counted in floating-point operations.

A layer is timed by itself, with its arguments in the whole model. Both ways of measuring run four passes:

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
from tqdm import tqdm

from ds_interlock.heads.output_layers import first_tensor
from ds_interlock.planning.profile import HeadProfile, LayerProfile

MakeOptimizer = Callable[[list[Tensor]], Any]

_BYTES_PER_PARAMETER_AND_STEP = 28  # Adam in float32: weight, gradient, two moments read, three written
_FLOPS_PER_BYTE = 100  # assumed where nothing is measured: operations in the time that memory moves a byte


@dataclass(frozen=True)
class LayerCall:
    """A layer, its name for people, and what the model called it with."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]  # the first floating-point tensor is the hidden state
    options: Mapping[str, Any] = field(default_factory=dict)


class Stopwatch:
    """Times work on the device that ``synchronize`` waits for: in ``num_rounds``, after one left out."""

    def __init__(self, synchronize: Callable[[], None], num_rounds: int = 5) -> None:
        self.synchronize, self.num_rounds = synchronize, num_rounds + 1

    def __call__(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that ``work`` takes, and its result."""
        self.synchronize()
        start = time.perf_counter()
        result = work()
        self.synchronize()
        return time.perf_counter() - start, result


@dataclass(frozen=True)
class FlopMeter:
    """Counts operations on tensors without contents, at what a device is taken to reach, not its peak."""

    flops_per_second: float
    num_rounds = 1

    def __call__(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that the matrix products and attention of ``work`` would take, and its result."""
        with FlopCounterMode(display=False) as counter:
            result = work()
        return float(counter.get_total_flops()) / self.flops_per_second, result


Meter = Stopwatch | FlopMeter


class _Layer:
    """A layer between its forward and its last backward pass, with the times of its passes so far."""

    def __init__(self, call: LayerCall) -> None:
        self.call = call
        self.inputs = tuple(_as_leaf(value) for value in call.inputs)
        self.options = {name: _as_leaf(value) for name, value in call.options.items()}
        values = (*self.inputs, *self.options.values())
        self.hidden = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
        self.parameters = [p for p in call.module.parameters() if p.requires_grad]
        self.seconds: dict[str, list[float]] = {"forward": [], "relay": [], "backward": [], "step": []}
        self.kept_bytes = 0

    def forward(self, meter: Meter) -> None:
        weights = [*self.call.module.parameters(), *self.call.module.buffers()]
        with _kept_for_backward(weights) as kept:
            seconds, output = meter(lambda: self.call.module(*self.inputs, **self.options))
        self.seconds["forward"].append(seconds)
        self.output = first_tensor(output)
        self.gradient = torch.ones_like(self.output)
        self.kept_bytes = sum(storage.nbytes() for storage in kept.values())
        self.output_bytes = self.output.numel() * self.output.element_size()

    def relay(self, meter: Meter) -> None:
        def input_gradient() -> None:
            torch.autograd.grad(self.output, self.hidden, self.gradient, retain_graph=True, allow_unused=True)

        if self.hidden:
            self.seconds["relay"].append(meter(input_gradient)[0])

    def backward(self, meter: Meter) -> None:
        both = [*self.parameters, *self.hidden]
        if self.parameters:
            seconds, _ = meter(lambda: torch.autograd.backward(self.output, self.gradient, inputs=both))
            self.seconds["backward"].append(seconds)
        for tensor in both:
            tensor.grad = None
        del self.output, self.gradient

    def profile(self) -> LayerProfile:
        forward, relay, backward, step = map(_median, self.seconds.values())
        return LayerProfile(
            name=self.call.name,
            forward_seconds=forward,
            input_gradient_seconds=relay,
            weight_gradient_seconds=max(0.0, backward - relay),
            optimizer_seconds=step,
            num_parameters=sum(p.numel() for p in self.parameters),
            activation_bytes=self.kept_bytes,
            output_bytes=self.output_bytes,
        )


def profile_layers(
    calls: Sequence[LayerCall], meter: Meter, optimizer: MakeOptimizer | None
) -> list[LayerProfile]:
    """The costs of layers, each timed by itself, one after the other in the order of training.

    A layer timed over and over would find its weights in the processor's cache, where they are not when a
    whole model runs. Without ``optimizer`` its step costs nothing.
    """
    layers = [_Layer(call) for call in calls]
    for _ in tqdm(range(meter.num_rounds), "layers", unit="round", leave=False, disable=None):
        for layer in layers:
            layer.forward(meter)
        for layer in reversed(layers):
            layer.relay(meter)
        for layer in reversed(layers):
            layer.backward(meter)
        for layer in layers:
            layer.seconds["step"].append(_step_seconds(layer.parameters, meter, optimizer))
    return [layer.profile() for layer in layers]


def _median(seconds: Sequence[float]) -> float:
    """The median, of several rounds without the first; 0 of none."""
    return statistics.median(seconds[1:] or seconds) if seconds else 0.0


def loss_seconds(loss: Callable[[Tensor], Tensor], value: Tensor, meter: Meter) -> float:
    """Median time of ``loss(value)``, forward and backward."""
    leaf = value.detach().requires_grad_()
    rounds = range(meter.num_rounds)
    return _median([meter(lambda: loss(leaf).backward())[0] for _ in rounds])  # type: ignore[no-untyped-call]


def profile_head(
    head: nn.Module,
    loss: Callable[[Tensor], Tensor],
    hidden: Tensor,
    meter: Meter,
    optimizer: MakeOptimizer | None,
    head_type: str,
) -> HeadProfile:
    """The cost of one auxiliary head: ``loss(hidden)`` forward, and backward to its weights and its input."""
    parameters = [p for p in head.parameters() if p.requires_grad]
    seconds = loss_seconds(loss, hidden, meter)
    step = _median([_step_seconds(parameters, meter, optimizer) for _ in range(meter.num_rounds)])
    size = sum(p.numel() for p in parameters)
    return HeadProfile(type=head_type, seconds=seconds, optimizer_seconds=step, num_parameters=size)


def _step_seconds(parameters: Sequence[Tensor], meter: Meter, optimizer: MakeOptimizer | None) -> float:
    """Time of one optimizer step; from the bytes it moves if nothing runs."""
    if not parameters:
        return 0.0
    if isinstance(meter, FlopMeter):
        moved = _BYTES_PER_PARAMETER_AND_STEP * sum(p.numel() for p in parameters)
        return moved / (meter.flops_per_second / _FLOPS_PER_BYTE)
    if optimizer is None:
        return 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    stepping = optimizer(list(parameters))
    stepping.step()  # makes its state
    seconds, _ = meter(stepping.step)
    for parameter in parameters:
        parameter.grad = None
    return seconds


def _as_leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value


@contextmanager
def _kept_for_backward(weights: Sequence[Tensor]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Notes every storage that is kept for the backward pass, by its number, ``weights`` left out."""
    left_out = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, torch.UntypedStorage] = {}  # one that is freed might come back under the same number

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept
