"""One stage's share of the work: forward with captures, heads, relays, weight gradient.

For one micro-batch on a stage with a head at its end:

    inputs ──► layers ──► captured hidden state ──┬──► sent to the next stage
       ▲                        ▲                 │
       │ I  input gradient      │ cotangents      └──► detached copy ──► head ──► loss
       │    of one relay        │                             │ H            │
       └────────────────────────┴── from the next stage, ◄────┴──────────────┘
                                    and from own heads     gradient of the copy

The forward builds the graph of a micro-batch once. It is walked back once for each relay (input gradient
only) and once for the weights; the last pass frees it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.utils import _pytree

from ds_interlock.errors import ConfigError
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.dependency import num_backward_passes, received_bundles
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.backward import Backward, HeadLoss, LayerPass
from ds_interlock.stage.hidden import (
    Gradients,
    Hidden,
    apart,
    check_travels,
    copied,
    detached,
    floats,
    leaves,
    owned,
    settled,
)

LossFn = Callable[[Any, Any], Tensor]


@dataclass
class _InFlight:
    """A micro-batch between its first forward and its last backward pass."""

    inputs: Hidden
    labels: Any
    hidden: dict[int, Hidden]
    """Captured hidden states by the number of layers before them."""
    passes_left: int
    of_heads: dict[int, Gradients] = field(default_factory=dict)
    of_bundles: dict[tuple[int, ...], Gradients] = field(default_factory=dict)


@dataclass(eq=False)
class StageWork:
    """Does the compute actions of one stage."""

    plan: GradientFlowPlan
    stage: int
    run_layers: Callable[[Hidden, int, int], Hidden]
    """``run_layers(hidden, start, stop)`` applies layers ``start .. stop - 1``, counted over the model."""
    parameters: list[nn.Parameter]
    """The layers' parameters. Those that are not frozen when a batch begins learn; so do those of heads."""
    heads: Mapping[int, nn.Module]
    """Auxiliary heads of this stage by loss."""
    loss_fn: LossFn | None
    """``loss_fn(outputs, labels)``, a scalar; None if the last layer returns the loss.

    A method ``beside(hidden)``, if it has one, is added to every loss: of what a head reads, or the outputs.
    """
    backward: Backward = field(default_factory=Backward)
    num_label_parts: int | None = None
    """How many parts of a tuple of labels the later stages read; None: all."""

    def __post_init__(self) -> None:
        self.num_micro_batches = 1
        self._num_passes = num_backward_passes(self.plan, self.stage)
        if self._num_passes > 1:  # or torch.compile's backward would free what the next pass needs
            functorch.donated_buffer = False
        self._trainable: list[nn.Parameter] = []
        self._in_flight: dict[int, _InFlight] = {}
        self._loss_sums: dict[int, Tensor] = {}

    def begin_batch(self, num_micro_batches: int) -> None:
        """Losses are averaged over ``num_micro_batches`` from now on."""
        self.num_micro_batches = num_micro_batches
        self._trainable = [parameter for parameter in self.parameters if parameter.requires_grad]
        self._in_flight.clear()
        self._loss_sums.clear()

    def feed(self, micro_batch: int, inputs: Hidden, labels: Any) -> None:
        """Takes in what a micro-batch starts from: data, or what the previous stage has sent.

        The memory of ``inputs`` belongs to the layers from now on.
        """
        if not torch.is_grad_enabled():
            self._in_flight.clear()  # no backward pass will come for the previous one
        needs_gradient = torch.is_grad_enabled() and self.plan.bundles(self.stage)
        inputs = leaves(inputs) if needs_gradient else detached(inputs)
        first = self.plan.stage_bounds[self.stage]
        self._in_flight[micro_batch] = _InFlight(inputs, labels, {first: owned(inputs)}, self._num_passes)

    def feed_gradient(self, micro_batch: int, bundle: tuple[int, ...], gradients: Gradients) -> None:
        """Takes in the gradient of ``bundle`` that the next stage has sent."""
        self._in_flight[micro_batch].of_bundles[bundle] = gradients

    def run(self, action: Action) -> Gradients | None:
        """Does one compute action. Under ``I`` and ``B`` returns gradients for the previous stage."""
        try:
            return self._run(action)
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            first, end = self.plan.stage_bounds[self.stage : self.stage + 2]
            raise ConfigError(
                f"one of the layers {first} to {end - 1} (stage {self.stage}) calls torch.utils.checkpoint "
                "with use_reentrant=True, which allows no gradient of some inputs alone, as relays and "
                "interlock.myopia need it: set use_reentrant=False there, or use mode "
                '"local" or "global" without myopia'
            ) from error

    def _run(self, action: Action) -> Gradients | None:
        match action.kind:
            case Kind.FORWARD:
                self._forward(action)
            case Kind.HEAD:
                self._head(action)
            case Kind.INPUT_GRADIENT:
                return self._relay(action)
            case Kind.WEIGHT_GRADIENT:
                # The only pass there is may go to all leaves: layers that checkpoint re-entrantly need that.
                is_only = self._num_passes == 1 and not self.plan.bundles(self.stage)
                self.backward.walk_back(self._layer_pass(action), () if is_only else None)
            case Kind.BACKWARD:
                inputs = floats(self._in_flight[action.micro_batch].inputs)
                return self.backward.walk_back(self._layer_pass(action), inputs)
        return None

    def output(self, micro_batch: int) -> tuple[Hidden, Any]:
        """What the next stage starts from: the hidden state at the end of this one, and the labels."""
        entry = self._in_flight[micro_batch]
        end = self.plan.stage_bounds[self.stage + 1]
        labels = entry.labels
        if isinstance(labels, tuple) and self.num_label_parts is not None:
            labels = labels[: self.num_label_parts]
        return settled(entry.hidden[end], entry.inputs), labels

    def mean_losses(self) -> dict[int, Tensor]:
        """The mean of every loss of this stage over the micro-batches since ``begin_batch``."""
        return {loss: total / self.num_micro_batches for loss, total in self._loss_sums.items()}

    def _forward(self, action: Action) -> None:
        entry = self._in_flight[action.micro_batch]
        first, end = self.plan.stage_bounds[self.stage : self.stage + 2]
        start = max(entry.hidden)
        stop = self.plan.heads[action.losses[0]].after_layer if action.losses else end
        hidden = entry.hidden[start]
        # A head reads the hidden state in the middle of the stage after the next layer has.
        entry.hidden[stop] = self.run_layers(hidden if start == first else copied(hidden), start, stop)
        if stop == end and self.stage + 1 < self.plan.num_stages:
            check_travels(entry.hidden[stop], stop - 1)

    def _head(self, action: Action) -> None:
        entry = self._in_flight[action.micro_batch]
        (index,) = action.losses
        head = self.plan.heads[index]
        value_of = partial(self._loss_of, index, entry.labels)
        loss = HeadLoss(index, value_of, head.weight, self.num_micro_batches)
        entry.of_heads[index] = self.backward.head(loss, entry.hidden[head.after_layer])

    def _loss_of(self, loss: int, labels: Any, hidden: Hidden) -> Tensor:
        head: Any = self.heads.get(loss)
        # Labels go to other stages too, and so do hidden states, but not the outputs of the model.
        labels, hidden = copied(labels), (owned if loss == self.plan.final else copied)(hidden)
        try:
            if head is not None and hasattr(head, "loss"):
                value = head.loss(hidden, labels, self.loss_fn)
            else:
                outputs = hidden if head is None else head(hidden)
                value = outputs if self.loss_fn is None else self.loss_fn(outputs, labels)
            if beside := getattr(self.loss_fn, "beside", None):
                value = value + beside(hidden)
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{self._name(loss)} failed on a hidden state of shape {_shapes(hidden)} and labels of "
                f"shape {_shapes(labels)}: {error}. A head must return what the model's last layer "
                "returns, and loss_fn(outputs, labels) a scalar"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ConfigError(f"{self._name(loss)} gave {_shapes(value)}: expected one number, a scalar")
        own = value.detach()
        self._loss_sums[loss] = self._loss_sums.get(loss, torch.zeros_like(own)) + own
        return value

    def _name(self, loss: int) -> str:
        if loss == self.plan.final:
            return f"the final loss (stage {self.stage})"
        return f"the auxiliary head after layer {self.plan.heads[loss].after_layer} (stage {self.stage})"

    def _relay(self, action: Action) -> Gradients:
        entry = self._in_flight[action.micro_batch]
        inputs = floats(entry.inputs)
        outputs, cotangents = self._cotangents(entry, frozenset(action.losses))
        more = self._pass_done(action)
        if not inputs:  # integers only
            return ()
        gradients = torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=more, materialize_grads=True
        )
        return apart(gradients, cotangents)

    def _layer_pass(self, action: Action) -> LayerPass:
        entry = self._in_flight[action.micro_batch]
        outputs, cotangents = self._cotangents(entry, self.plan.trained_by[self.stage])
        return LayerPass(outputs, cotangents, self._trainable, self._pass_done(action))

    def _pass_done(self, action: Action) -> bool:
        """Counts a backward pass; whether another follows and needs the graph."""
        entry = self._in_flight[action.micro_batch]
        entry.passes_left -= 1
        if entry.passes_left == 0:
            del self._in_flight[action.micro_batch]
        return entry.passes_left > 0

    def _cotangents(self, entry: _InFlight, losses: frozenset[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Where the gradients of ``losses`` enter this stage, and their sums there."""
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


def _shapes(value: Any) -> str:
    return str(_pytree.tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), value))
