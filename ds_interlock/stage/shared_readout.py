"""Copies of the model's live unembedding for auxiliary heads to read with, a new one every R batches.

    before batch            0    R    2R   3R
    the last stage copies   a    b    c    d     while its weights are trained
    heads read with         a    a    b    c     R batches long

The number of the batch alone decides which copy is in use, wherever the stages are at that moment. So a copy
has R batches of time to reach them.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_interlock.errors import ConfigError

Weights = tuple[Tensor, ...]
"""Weight ``[v, d]`` and, where there is one, bias ``[v]``."""


def snapshot(weights: Weights) -> Weights:
    """The values in memory of their own, without history."""
    return tuple(part.detach().clone() for part in weights)


class Source(NamedTuple):
    """Where a model has its unembedding."""

    layer: int
    """Counted over the whole model."""
    names: tuple[str, ...]
    """Of weight and bias within the layer."""

    def weights_in(self, layer: Any) -> Weights:
        """The live weights in ``layer``, the module of that number."""
        try:
            owners = [(layer.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in self.names]
            return tuple(getattr(owner, attribute) for owner, attribute in owners)
        except AttributeError as error:
            raise ConfigError(
                f'interlock.head.type "shared": layer {self.layer} is {type(layer).__name__}, which lacks '
                f'the unembedding {" and ".join(self.names)} ({error}); use another type, as "norm_linear"'
            ) from error


class SharedUnembedding(nn.Linear):
    """A copy of the model's unembedding in a head; nothing but a newer copy changes it."""

    def __init__(self, weights: Weights, source: Source, refresh_every: int) -> None:
        num_outputs, width = weights[0].shape
        super().__init__(width, num_outputs, bias=len(weights) > 1, device="meta")
        self.source, self.refresh_every = source, refresh_every
        self.use(weights)

    def use(self, weights: Weights) -> None:
        """From now on has ``weights``, in their memory."""
        parts = [part if isinstance(part, nn.Parameter) else nn.Parameter(part) for part in weights]
        for name, part in zip(("weight", "bias"), parts, strict=False):
            setattr(self, name, part.requires_grad_(False))

    @property
    def weights(self) -> Weights:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class SharedReadout(nn.Module):
    """The copies of a stage, or of all stages in one process: what is in use, and what comes next.

    ``next_weight`` and ``next_bias`` are in use from the next multiple of ``refresh_every`` on; at first they
    have the initial values. Heads share one memory.
    """

    next_weight: Tensor
    next_bias: Tensor | None

    def __init__(self, copies: Sequence[SharedUnembedding]) -> None:
        super().__init__()
        self._first = (copies[0],)  # in a tuple: part of a head, not of this
        self.source, self.refresh_every = copies[0].source, copies[0].refresh_every
        self.num_batches = 0
        """Of those counted by ``begin_batch``."""
        self.take(snapshot(self.in_use))
        self.join(copies)

    @staticmethod
    def copies_in(modules: Iterable[nn.Module]) -> list[SharedUnembedding]:
        """Those of these heads."""
        return [part for head in modules for part in head.modules() if isinstance(part, SharedUnembedding)]

    def join(self, copies: Iterable[SharedUnembedding]) -> None:
        """Lets ``copies``, of new heads, have what is in use."""
        for copy in copies:
            copy.use(self.in_use)

    @property
    def in_use(self) -> Weights:
        """What heads read with."""
        return self._first[0].weights

    @property
    def next(self) -> Weights:
        """What they will read with."""
        return (self.next_weight,) if self.next_bias is None else (self.next_weight, self.next_bias)

    @torch.no_grad()
    def turn(self) -> None:
        """Puts into use what is next."""
        for part, value in zip(self.in_use, self.next, strict=True):
            part.copy_(value)

    def take(self, weights: Weights) -> None:
        """Keeps ``weights``, which nothing may change any more, to be next."""
        for name, part in zip(("next_weight", "next_bias"), (*weights, None), strict=False):
            self.register_buffer(name, part)

    def restore(self, in_use: Weights, following: Weights) -> None:
        """Takes up values for ``in_use`` and ``next``, from anywhere."""
        own = self.in_use[0].detach()
        self.take(tuple(part.detach().to(own, copy=True) for part in in_use))
        self.turn()
        self.take(tuple(part.detach().to(own, copy=True) for part in following))

    def begin_batch(self, live: Weights) -> None:
        """In one process, before every batch, with the ``live`` weights. Frozen ones stay as they were."""
        if self.num_batches % self.refresh_every == 0 and live[0].requires_grad:
            self.turn()
            self.take(snapshot(live))
            if self.num_batches == 0:
                self.turn()
        self.num_batches += 1

    def get_extra_state(self) -> int:
        """``num_batches``, for ``state_dict``."""
        return self.num_batches

    def set_extra_state(self, state: int) -> None:
        """The other way round."""
        self.num_batches = state
