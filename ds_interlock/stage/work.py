"""One stage's share of the work: forward with captures, heads, relays, weight gradient.

The same code runs on every rank of a pipeline (``engine.py``) and for all stages in one process
(``in_process.py``). For one micro-batch on a stage with a head at its end:

    inputs ──► layers ──► captured hidden state ──┬──► sent to the next stage
       ▲                        ▲                 │
       │ I  input gradient      │ cotangents      └──► detached copy ──► head ──► loss
       │    of one relay        │                             │ H            │
       └────────────────────────┴── from the next stage, ◄────┴──────────────┘
                                    and from own heads     gradient of the copy

The graph of a micro-batch is built once by the forward and walked back several times: once for each
relay (input gradient only: no weight gradient is computed) and once for the weights. The last pass
lets go of it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ds_interlock.errors import ConfigError
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.dependency import backward_actions, received_bundles
from ds_interlock.schedule.plan import GradientFlowPlan

Hidden = Tensor | tuple[Tensor, ...]
"""What travels between layers: a tensor, or a tuple of which the floating-point ones have gradients."""

Gradients = tuple[Tensor, ...]
"""One gradient for every floating-point tensor of a ``Hidden``."""

LossFn = Callable[[Any, Any], Tensor]


@dataclass
class _InFlight:
    """A micro-batch between its first forward and its last backward pass."""

    inputs: Hidden
    labels: Any
    hidden: dict[int, Hidden]
    """Captured hidden states by the number of layers in front of them."""
    passes_left: int
    of_heads: dict[int, Gradients] = field(default_factory=dict)
    of_bundles: dict[tuple[int, ...], Gradients] = field(default_factory=dict)


class StageWork:
    """Carries out the compute actions of one stage.

    Args:
        plan: The gradient flow.
        stage: Which stage this is.
        run_layers: ``run_layers(hidden, start, stop)`` applies layers ``start .. stop - 1``, counted
            over the whole model.
        parameters: The layers' trainable parameters (the heads' own are found by autograd).
        heads: Auxiliary heads of this stage by loss; the final loss has none.
        loss_fn: ``loss_fn(outputs, labels)``, a scalar; None if the last layer returns the loss.
        weight_pass: Context in which gradients are accumulated into parameters.
    """

    def __init__(
        self,
        plan: GradientFlowPlan,
        stage: int,
        run_layers: Callable[[Hidden, int, int], Hidden],
        parameters: list[nn.Parameter],
        heads: Mapping[int, nn.Module],
        loss_fn: LossFn | None,
        weight_pass: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.plan = plan
        self.stage = stage
        self.run_layers = run_layers
        self.parameters = parameters
        self.heads = heads
        self.loss_fn = loss_fn
        self.weight_pass = weight_pass
        self.num_micro_batches = 1
        self._num_passes = len(backward_actions(plan, stage, 0))
        self._in_flight: dict[int, _InFlight] = {}
        self._loss_sums: dict[int, Tensor] = {}

    def begin_batch(self, num_micro_batches: int) -> None:
        """Losses are averaged over ``num_micro_batches`` from now on."""
        self.num_micro_batches = num_micro_batches
        self._in_flight.clear()
        self._loss_sums.clear()

    def feed(self, micro_batch: int, inputs: Hidden, labels: Any) -> None:
        """Takes in what a micro-batch starts from: data, or what the stage in front has sent."""
        inputs = _map(inputs, torch.Tensor.detach)
        if not torch.is_grad_enabled():
            self._in_flight.clear()  # no backward pass will come for the one before
        elif self.plan.bundles(self.stage):
            inputs = _map(inputs, _leaf)
        first = self.plan.stage_bounds[self.stage]
        self._in_flight[micro_batch] = _InFlight(inputs, labels, {first: inputs}, self._num_passes)

    def feed_gradient(self, micro_batch: int, bundle: tuple[int, ...], gradients: Gradients) -> None:
        """Takes in the gradient of ``bundle`` that the stage behind has sent."""
        self._in_flight[micro_batch].of_bundles[bundle] = gradients

    def run(self, action: Action) -> Gradients | None:
        """Does one compute action.

        Returns:
            For ``I`` and ``B`` the gradients to send to the stage in front; otherwise None.
        """
        match action.kind:
            case Kind.FORWARD:
                self._forward(action)
                return None
            case Kind.HEAD:
                self._head(action)
                return None
            case Kind.INPUT_GRADIENT:
                return self._relay(action)
            case Kind.WEIGHT_GRADIENT:
                self._weight_gradient(action)
                return None
            case _:
                assert action.kind is Kind.BACKWARD
                return self._backward(action)

    def output(self, micro_batch: int) -> tuple[Hidden, Any]:
        """What the next stage starts from: the hidden state at the end of this one, and the labels."""
        entry = self._in_flight[micro_batch]
        end = self.plan.stage_bounds[self.stage + 1]
        return _map(entry.hidden[end], torch.Tensor.detach), entry.labels

    def mean_losses(self) -> dict[int, Tensor]:
        """The mean of every loss of this stage over the micro-batches since ``begin_batch``."""
        return {loss: total / self.num_micro_batches for loss, total in self._loss_sums.items()}

    @property
    def num_in_flight(self) -> int:
        """Micro-batches whose activations are held now."""
        return len(self._in_flight)

    # The five kinds of work.

    def _forward(self, action: Action) -> None:
        entry = self._in_flight[action.micro_batch]
        start = max(entry.hidden)
        stop = (
            self.plan.heads[action.losses[0]].after_layer
            if action.losses
            else self.plan.stage_bounds[self.stage + 1]
        )
        entry.hidden[stop] = self.run_layers(entry.hidden[start], start, stop)

    def _head(self, action: Action) -> None:
        """A head's input is a constant for its own parameters; its gradient there starts the relays."""
        entry = self._in_flight[action.micro_batch]
        (loss,) = action.losses
        head = self.plan.heads[loss]
        hidden = _map(entry.hidden[head.after_layer], torch.Tensor.detach)
        if not torch.is_grad_enabled():
            self._add_loss(loss, self._loss_at(loss, hidden, entry.labels))
            return
        hidden = _map(hidden, _leaf)
        value = self._loss_at(loss, hidden, entry.labels)
        self._add_loss(loss, value)
        scaled = value / self.num_micro_batches
        with self.weight_pass():
            (scaled if head.weight == 1.0 else scaled * head.weight).backward()  # type: ignore[no-untyped-call]
        entry.of_heads[loss] = _gradients_of(floats(hidden))

    def _loss_at(self, loss: int, hidden: Hidden, labels: Any) -> Tensor:
        head: Any = self.heads.get(loss)
        try:
            if head is not None and hasattr(head, "loss"):
                value = head.loss(hidden, labels, self.loss_fn)
            else:
                outputs = hidden if head is None else head(hidden)
                value = outputs if self.loss_fn is None else self.loss_fn(outputs, labels)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{self._name(loss)} failed on a hidden state of shape {_shapes(hidden)} and labels of "
                f"shape {_shapes(labels)}: {error}. A head must return what the model's last layer "
                "returns, and loss_fn(outputs, labels) a scalar"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ConfigError(
                f"{self._name(loss)} gave {_shapes(value)}: expected one number, a scalar tensor"
            )
        return value

    def _name(self, loss: int) -> str:
        if loss == self.plan.final:
            return f"the final loss (stage {self.stage})"
        return f"the auxiliary head after layer {self.plan.heads[loss].after_layer} (stage {self.stage})"

    def _add_loss(self, loss: int, value: Tensor) -> None:
        value = value.detach()
        total = self._loss_sums.get(loss)
        self._loss_sums[loss] = torch.zeros_like(value) + value if total is None else total + value

    def _relay(self, action: Action) -> Gradients:
        entry = self._in_flight[action.micro_batch]
        inputs = floats(entry.inputs)
        outputs, cotangents = self._cotangents(entry, frozenset(action.losses))
        found = torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=self._pass_done(action), allow_unused=True
        )
        return tuple(or_zeros(gradient, tensor) for gradient, tensor in zip(found, inputs, strict=True))

    def _weight_gradient(self, action: Action) -> None:
        entry = self._in_flight[action.micro_batch]
        outputs, cotangents = self._cotangents(entry, self.plan.trained_by[self.stage])
        more = self._pass_done(action)
        if outputs and self.parameters:
            with self.weight_pass():
                torch.autograd.backward(outputs, cotangents, retain_graph=more, inputs=self.parameters)

    def _backward(self, action: Action) -> Gradients:
        entry = self._in_flight[action.micro_batch]
        outputs, cotangents = self._cotangents(entry, self.plan.trained_by[self.stage])
        more = self._pass_done(action)
        if outputs:  # a first stage may be frozen as a whole
            with self.weight_pass():
                torch.autograd.backward(outputs, cotangents, retain_graph=more)
        return _gradients_of(floats(entry.inputs))

    def _pass_done(self, action: Action) -> bool:
        """Counts a backward pass; True if another follows and the graph must stay."""
        entry = self._in_flight[action.micro_batch]
        entry.passes_left -= 1
        if entry.passes_left == 0:
            del self._in_flight[action.micro_batch]
        return entry.passes_left > 0

    def _cotangents(self, entry: _InFlight, losses: frozenset[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Where the gradients of ``losses`` enter this stage, and what they are there, summed."""
        at: dict[int, list[Gradients]] = {}
        for loss in self.plan.losses_at(self.stage):
            if loss in losses:
                at.setdefault(self.plan.heads[loss].after_layer, []).append(entry.of_heads[loss])
        for bundle in received_bundles(self.plan, self.stage, losses):
            at.setdefault(self.plan.stage_bounds[self.stage + 1], []).append(entry.of_bundles[bundle])
        outputs, cotangents = [], []
        for position, arrived in at.items():
            tensors = floats(entry.hidden[position])
            summed = [reduce(torch.add, parts) for parts in zip(*arrived, strict=True)]
            for tensor, cotangent in zip(tensors, summed, strict=True):
                if tensor.requires_grad:
                    outputs.append(tensor)
                    cotangents.append(cotangent)
        return outputs, cotangents


def _map(hidden: Hidden, function: Callable[[Tensor], Tensor]) -> Hidden:
    if isinstance(hidden, Tensor):
        return function(hidden)
    return tuple(function(tensor) for tensor in hidden)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def leaves(hidden: Hidden) -> Hidden:
    """The same values without history; the floating-point ones are to have gradients."""
    return _map(_map(hidden, torch.Tensor.detach), _leaf)


def floats(hidden: Hidden) -> tuple[Tensor, ...]:
    """The tensors of ``hidden`` that have gradients."""
    tensors = (hidden,) if isinstance(hidden, Tensor) else hidden
    return tuple(tensor for tensor in tensors if tensor.is_floating_point())


def or_zeros(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    """``gradient``, or that of a ``tensor`` on which nothing depends."""
    return torch.zeros_like(tensor) if gradient is None else gradient


def _gradients_of(tensors: tuple[Tensor, ...]) -> Gradients:
    return tuple(or_zeros(tensor.grad, tensor) for tensor in tensors)


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_shapes(item) for item in value) + ")"
    return type(value).__name__
