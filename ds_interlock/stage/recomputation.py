"""Activation checkpointing under which a recomputation changes nothing but the time."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_interlock.stage.hidden import Hidden, copied


def recomputed(run: Callable[[Hidden], Hidden], hidden: Hidden, layers: Sequence[nn.Module]) -> Hidden:
    """Applies ``run``, which calls ``layers``, without keeping their activations for the backward.

    Layers may change what they receive in place. Buffers that their forward updates, such as the running
    means of batch norm, are as after one forward, however often it is run again.
    """
    result: Hidden = checkpoint(
        lambda inputs: run(copied(inputs)),  # the inputs are needed again
        hidden,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), BuffersKept(layers)),
    )
    return result


class BuffersKept:
    """A context, for any number of times, in which buffers are copies; the copies are dropped.

    All are copied: batch norm updates its own without a trace in their version. A buffer that several modules
    share stays shared.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers

    def __enter__(self) -> None:
        self._buffers: dict[tuple[nn.Module, str], Tensor] = {
            (module, name): buffer
            for layer in self._layers
            for module in layer.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        }
        copies = {buffer: buffer.clone() for buffer in self._buffers.values()}
        for place, buffer in self._buffers.items():
            setattr(*place, copies[buffer])

    def __exit__(self, *error: Any) -> None:
        for place, buffer in self._buffers.items():
            setattr(*place, buffer)
