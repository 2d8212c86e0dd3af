"""Finds the output layers of a model, which auxiliary heads repeat: norm, unembedding, what follows it.

The layers are looked at from the last one backwards (picture in ``factory.py``). Specifications are built on
the meta device, and the layer that unembeds is called there: the look allocates nothing and draws no random
number.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from torch.func import functional_call

from ds_interlock.errors import ConfigError
from ds_interlock.stage.shared_readout import Source

Layer: TypeAlias = Any  # LayerSpec (which has no types), nn.Module, or a function

_DEFAULT_STD = 0.02

PASS_HEAD = (
    "Pass heads of your own: InterlockPipelineModule(..., head=make_head), where make_head(head: LossHead) "
    "-> nn.Module turns the hidden state into what the model's last layer would output"
)


@dataclass(frozen=True)
class OutputLayers:
    """The last layers of a model, as far as a head repeats them. Frozen copies have the model's values."""

    width: int
    """Of the hidden state, d."""
    num_outputs: int
    """v."""
    bias: bool
    """Whether the unembedding has one."""
    init_std: float | None
    """Standard deviation of the unembedding's initial weights; None for torch's own default."""
    make_norm: Callable[[], nn.Module] | None
    """Builds a norm like the one before the unembedding; None without one."""
    copy_norm: Callable[[], nn.Module] | None
    """A frozen copy of that norm; None without one."""
    copy_unembedding: Callable[[], nn.Linear]
    """A frozen copy of the unembedding."""
    source: Source
    """Where the unembedding is."""
    in_tuple: bool
    """Whether the unembedding's layer returns ``(outputs,)``."""
    tail: tuple[Layer, ...]
    """What follows the unembedding. It has no weights."""


def find_output_layers(layers: Sequence[Layer]) -> OutputLayers:
    """Looks for the unembedding and the norm before it; ConfigError if there is no unembedding.

    The unembedding is the last ``nn.Linear``, or the weight of a ``TiedLayerSpec`` with a ``forward_fn``
    (an embedding used in reverse). The norm is the nearest one before it that is as wide.
    """
    tail: list[Layer] = []
    pieces = _from_the_end(layers)
    for last in pieces:
        if has_weights(last.module):
            break
        tail.insert(0, last.module if last.path else last.owner)
    else:
        raise ConfigError(f"no auxiliary head can be derived: no layer has weights. {PASS_HEAD}")
    weight_name, bias_name, inside = _unembedding(last)
    weight = _at(last.module, weight_name.removeprefix(f"{last.path}."))
    num_outputs, width = weight.shape
    before = chain(inside, (part for piece in pieces for part in reversed(_parts(piece))))
    norm = next((part for part in before if _is_norm(part.module, width)), None)
    return OutputLayers(
        width=width,
        num_outputs=num_outputs,
        bias=bias_name is not None,
        init_std=_init_std(last.owner, weight),
        make_norm=None if norm is None else partial(_like, norm.module, width),
        copy_norm=None if norm is None else partial(_frozen_copy, norm),
        copy_unembedding=partial(_frozen_linear, last.owner, weight_name, bias_name),
        source=Source(_number(last.owner, layers), (weight_name, *([bias_name] if bias_name else ()))),
        in_tuple=_returns_tuple(last, weight),
        tail=tuple(tail),
    )


def _number(layer: Layer, layers: Sequence[Layer]) -> int:
    return max(number for number, other in enumerate(layers) if other is layer)


class _Part(NamedTuple):
    """A module, and where to find it with its weights: at ``path`` in the layer ``owner``."""

    module: nn.Module
    owner: Layer
    path: str = ""


def _from_the_end(layers: Sequence[Layer]) -> Iterator[_Part]:
    """The layers, the last first; a Sequential in its parts."""
    for number in reversed(range(len(layers))):
        layer = layers[number]
        module = look_at(layer, f"layer {number}")
        if type(module) is nn.Sequential:
            # The parts of a spec exist on the meta device only: as parts of the tail they have no weights,
            # and so nothing that would have to be allocated.
            parts = reversed(module._modules.items())
            yield from (_Part(part, layer, name) for name, part in parts if part is not None)
        else:
            yield _Part(module, layer)


def _parts(piece: _Part) -> list[_Part]:
    named = piece.module.named_modules(prefix=piece.path)
    return [_Part(module, piece.owner, name) for name, module in named]


class Function(nn.Module):
    """A plain function among modules."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Any) -> Any:
        return self.function(inputs)


def look_at(layer: Layer, name: str) -> nn.Module:
    """The module of ``layer``, on the meta device if it has to be built; ``name`` is for a ConfigError."""
    if not isinstance(layer, LayerSpec):
        return layer if isinstance(layer, nn.Module) else Function(layer)
    try:
        with torch.device("meta"):
            return build(layer)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"no auxiliary head can be derived: {name}, {layer!r}, cannot be built on the meta device "
            f"({error}). {PASS_HEAD}"
        ) from error


def build(spec: LayerSpec) -> nn.Module:
    """The module of ``spec``, with weights of its own."""
    module: nn.Module = spec.build()
    return module


def has_weights(module: nn.Module, recurse: bool = True) -> bool:
    """Whether ``module`` has parameters."""
    return next(module.parameters(recurse), None) is not None


def first_tensor(hidden: Any) -> Tensor:
    """The hidden state among what a layer returns."""
    first = hidden[0] if isinstance(hidden, tuple | list) else hidden
    assert isinstance(first, Tensor), f"a hidden state is a tensor, not a {type(first).__name__}"
    return first


def _unembedding(last: _Part) -> tuple[str, str | None, list[_Part]]:
    """The names of weight ``[v, d]`` and bias in the layer, and the modules before them, nearest first."""
    if isinstance(last.owner, TiedLayerSpec) and last.owner.forward_fn is not None and not last.path:
        for attribute in last.owner.tied_weight_attr:
            if _at(last.module, attribute).dim() == 2:
                return attribute, None, []
    parts = _parts(last)
    while parts:
        part, _, path = parts.pop()
        if isinstance(part, nn.Linear):
            prefix = f"{path}." if path else ""
            return f"{prefix}weight", None if part.bias is None else f"{prefix}bias", parts[::-1]
    raise ConfigError(
        "no auxiliary head can be derived: the last layer with weights is "
        f"{type(last.module).__name__}, which has no nn.Linear to unembed with. {PASS_HEAD}"
    )


def _returns_tuple(last: _Part, weight: Tensor) -> bool:
    """Whether the layer returns a tuple of one tensor; ConfigError if it returns more."""
    outputs = _outputs_on_meta(last, weight)
    if not isinstance(outputs, tuple | list):
        return False
    if len(outputs) == 1 and isinstance(outputs[0], Tensor):
        return True
    raise ConfigError(
        f"no auxiliary head can be derived: {type(last.module).__name__}, which unembeds, returns a "
        f"{type(outputs).__name__} of {len(outputs)}, of which a head would make the first only. {PASS_HEAD}"
    )


def _outputs_on_meta(last: _Part, weight: Tensor) -> Any:
    """What the layer returns, tried with hidden states of several forms; None if it takes none of them.

    Seven is a batch that no layer takes for a tuple by unpacking it.
    """
    values = {
        n: t.detach().to("meta")
        for n, t in chain(last.module.named_parameters(), last.module.named_buffers())
    }
    forward_fn = getattr(last.owner, "forward_fn", None) if not last.path else None
    for shape, num_others in product(((7, 3), (7,)), range(-1, 5)):
        hidden = torch.empty(*shape, weight.shape[1], dtype=weight.dtype, device="meta")
        others = (torch.empty(*shape, dtype=torch.int64, device="meta"),) * num_others
        inputs = hidden if num_others < 0 else (hidden, *others)
        with suppress(Exception), torch.no_grad():  # a layer may fail in any way on what it does not take
            if forward_fn is not None:
                return forward_fn(last.module, inputs)
            return functional_call(copy.copy(last.module), values, (inputs,))  # attributes stay as they are
    return None


def _at(module: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(owner), attribute))


def _is_norm(part: nn.Module, width: int) -> bool:
    """True for a LayerNorm or RMSNorm, torch's or a model's own class, over the last ``width`` entries."""
    if not type(part).__name__.endswith(("LayerNorm", "RMSNorm")):
        return False
    weight = getattr(part, "weight", None)
    shape = weight.shape if isinstance(weight, Tensor) else ()
    return tuple(getattr(part, "normalized_shape", shape)) == (width,)


def _like(norm: nn.Module, width: int) -> nn.Module:
    """A new norm of the class, width and eps of ``norm``, initialised as its class does it."""
    takes = inspect.signature(type(norm)).parameters
    options = {
        "eps": getattr(norm, "eps", getattr(norm, "variance_epsilon", None)),
        "elementwise_affine": getattr(norm, "weight", None) is not None,
        "bias": getattr(norm, "bias", None) is not None,
    }
    options = {name: value for name, value in options.items() if name in takes}
    try:
        return type(norm)(width, **options)
    except TypeError as error:
        raise ConfigError(
            f"no auxiliary head can be derived: the model's norm, {type(norm).__name__}, cannot be built "
            f"from a width and {options} ({error}). {PASS_HEAD}"
        ) from error


def _init_std(layer: Layer, weight: Tensor) -> float | None:
    """How the model initialises its unembedding, where that can be seen."""
    if isinstance(layer, LayerSpec):
        return None if layer.typename is nn.Linear else _DEFAULT_STD
    return _DEFAULT_STD if weight.is_meta else float(weight.detach().float().std())


# Copies by value. A specification is built once more: a layer that seeds itself then has the model's values.


def _with_values(layer: Layer) -> nn.Module:
    return build(layer) if isinstance(layer, LayerSpec) else layer


def _frozen_copy(part: _Part) -> nn.Module:
    return copy.deepcopy(_with_values(part.owner).get_submodule(part.path)).requires_grad_(False)


def _frozen_linear(layer: Layer, weight_name: str, bias_name: str | None) -> nn.Linear:
    module = _with_values(layer)
    weight = _at(module, weight_name).detach().clone()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias_name is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias_name is not None:
        linear.bias = nn.Parameter(_at(module, bias_name).detach().clone(), requires_grad=False)
    return linear
