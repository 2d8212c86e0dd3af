"""How the backward passes of a stage are computed, and where their gradients go."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_interlock.stage.hidden import Gradients, Hidden, detached, floats, leaves, unshared


class HeadLoss(NamedTuple):
    """The loss of one head for one micro-batch: its index in the plan, and a function of a hidden state."""

    loss: int
    of: Callable[[Hidden], Tensor]
    weight: float
    num_micro_batches: int

    def scaled(self, hidden: Hidden) -> Tensor:
        """The weighted loss, as its share of the batch."""
        value = self.of(hidden) / self.num_micro_batches
        return value if self.weight == 1.0 else value * self.weight


class LayerPass(NamedTuple):
    """One pass back through the layers of a stage, from gradients ``cotangents`` at ``outputs``."""

    outputs: list[Tensor]
    cotangents: list[Tensor]
    parameters: list[nn.Parameter]
    retain_graph: bool


class Backward:
    """The backward of training: adds gradients to ``.grad``. Under ``no_grad`` that of evaluation."""

    def __init__(self, weight_pass: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.weight_pass = weight_pass

    def head(self, loss: HeadLoss, hidden: Hidden) -> Gradients:
        """Computes ``loss``, to which ``hidden`` is a constant; returns the gradients of ``hidden``."""
        if not torch.is_grad_enabled():
            loss.of(detached(hidden))
            return ()
        hidden = leaves(hidden)
        value = loss.scaled(hidden)
        with self.weight_pass():
            value.backward()  # type: ignore[no-untyped-call]
        return _gradients_of(floats(hidden))

    def walk_back(self, layers: LayerPass, inputs: tuple[Tensor, ...] | None = None) -> Gradients:
        """Computes the gradients of the parameters and of ``inputs``, if any; returns those of ``inputs``."""
        outputs, cotangents, parameters, retain_graph = layers
        targets = parameters if inputs is None else None  # None means all leaves
        if outputs and (parameters or inputs is not None):  # a stage may be frozen as a whole
            with self.weight_pass():
                torch.autograd.backward(outputs, cotangents, retain_graph=retain_graph, inputs=targets)
        return _gradients_of(inputs or ())


def _gradients_of(tensors: tuple[Tensor, ...]) -> Gradients:
    return tuple(torch.zeros_like(t) if t.grad is None else unshared(t.grad) for t in tensors)
