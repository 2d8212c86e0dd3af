"""Auxiliary heads: from a hidden state inside the model to what the model's last layer would output.

A head repeats the end of the model it is for. That end is found by looking at the last layers:

    layers of the model    ... ─► block ─► block ─► norm ─► unembedding ─► (a callable)
                                    │                 └──────────┬────────────────┘
                                    │                        ModelEnd
                                    │                            │ same kinds and sizes, weights of its own
    linear                          ├─►               unembedding ─► (the callable)
    norm_linear                     ├─►        norm ─► unembedding ─► ...
    low_rank                        ├─►        norm ─► down ─► unembedding ─► ...
    block_linear                    └─► block ─► norm ─► unembedding ─► ...

A head module may have a method ``loss(hidden, labels, loss_fn)``, which then computes its loss in
place of ``loss_fn(head(hidden), labels)``. The heads built here use it for ``token_fraction``.

Shape suffixes: b batch, t position in the sequence, d hidden width, n chosen positions, v output
(vocabulary) entry. Where a suffix ends in ``td``, any number of position dimensions is meant.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from ds_interlock.config import HeadConfig
from ds_interlock.errors import ConfigError
from ds_interlock.schedule.plan import LossHead

Layer: TypeAlias = Any  # LayerSpec (which has no types), nn.Module, or a function
LossFn = Callable[[Tensor, Tensor], Tensor]
HeadFactory = Callable[[LossHead], nn.Module]

IGNORED_LABEL = -100
_DEFAULT_STD = 0.02

_PASS_HEAD = (
    "Pass heads of your own: InterlockPipelineModule(..., head=make_head), where "
    "make_head(head: LossHead) -> nn.Module returns what turns the hidden state into what the model's last "
    "layer would output"
)


def head_factory(config: HeadConfig, layers: Sequence[Layer]) -> HeadFactory:
    """The heads of a model whose user gave none. Looks at the model at once, builds heads when asked.

    Nothing is allocated for the look, and no random number is drawn.

    Args:
        config: The section ``"interlock.head"``.
        layers: All layers of the model, as given to ``PipelineModule``.

    Returns:
        A function from a head's place in the plan to a new head.

    Raises:
        ConfigError: If the end of the model cannot be made out.
    """
    end = find_model_end(layers)

    def make_head(head: LossHead) -> nn.Module:
        block = None
        if config.type == "block_linear":
            block = _another(layers[head.after_layer - 1], f"layer {head.after_layer - 1}")
        return AuxiliaryHead(_readout(config, end), end.width, config.token_fraction, block)

    return make_head


class AuxiliaryHead(nn.Module):
    """A readout of the hidden state, with one more block in front of it if ``block`` is given.

    Args:
        readout: From hidden states ``[..., d]`` to outputs ``[..., v]``, each position by itself.
        width: d.
        token_fraction: Share of the labelled positions a training loss is computed on.
        block: From the layers' hidden state (whatever it is) to one of the same form.
    """

    def __init__(
        self, readout: nn.Module, width: int, token_fraction: float = 1.0, block: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block = block
        self.readout = readout
        self.width = width
        self.token_fraction = token_fraction

    def forward(self, hidden: Any) -> Any:
        """What the model would output if it ended at ``hidden``: a tensor, or a tuple starting with it."""
        return self.readout(self._before_readout(hidden))

    def loss(self, hidden: Any, labels: Any, loss_fn: LossFn) -> Tensor:
        """The loss of this head, in training estimated without bias from a share of the positions.

        Args:
            hidden: As for ``forward``.
            labels: As the model's loss function takes them; integers ``[b, t]`` if positions are sampled.
            loss_fn: The model's loss function. If positions are sampled, it must average over those
                labelled other than -100.

        Raises:
            ConfigError: If positions are to be sampled and ``labels`` has not one for each.
        """
        hidden_btd = self._before_readout(hidden)
        if not self.training or self.token_fraction == 1:
            return loss_fn(self.readout(hidden_btd), labels)
        hidden_1nd, labels_1n = _sample_positions(hidden_btd, labels, self.token_fraction)
        return loss_fn(self.readout(hidden_1nd), labels_1n)

    def _before_readout(self, hidden: Any) -> Tensor:
        hidden_btd = _first(hidden)
        if hidden_btd.shape[-1] != self.width:
            raise ConfigError(
                f"interlock.head: the hidden state is {list(hidden_btd.shape)}, but the model's unembedding "
                f"takes vectors of {self.width}, so this layer is no place for a head of type linear, "
                f"norm_linear, low_rank or block_linear. {_PASS_HEAD}"
            )
        if self.block is None:
            return hidden_btd
        after = _first(self.block(hidden))
        if after.shape != hidden_btd.shape:
            raise ConfigError(
                f"interlock.head.type: block_linear needs a layer in front of the head that keeps the hidden "
                f"state's shape, but {type(self.block).__name__} turns {list(hidden_btd.shape)} into "
                f"{list(after.shape)}; choose another type"
            )
        return after


def _first(hidden: Any) -> Tensor:
    first = hidden[0] if isinstance(hidden, tuple | list) else hidden
    assert isinstance(first, Tensor), f"a hidden state is a tensor, not a {type(first).__name__}"
    return first


def _sample_positions(hidden_btd: Tensor, labels_bt: Any, fraction: float) -> tuple[Tensor, Tensor]:
    """A random share of the labelled positions, as one sequence: ``[1, n, d]`` and ``[1, n]``.

    Drawn from the device's global generator, whose state is part of a checkpoint. Every subset of n
    positions is equally likely, so a mean over it is an unbiased estimate of the mean over all.
    """
    if not isinstance(labels_bt, Tensor) or labels_bt.shape != hidden_btd.shape[:-1]:
        got = list(labels_bt.shape) if isinstance(labels_bt, Tensor) else type(labels_bt).__name__
        raise ConfigError(
            f"interlock.head.token_fraction: {fraction} needs one label for each position: a tensor "
            f"{list(hidden_btd.shape[:-1])} for hidden states {list(hidden_btd.shape)}, got {got}; "
            "set it to 1"
        )
    labels = labels_bt.flatten()
    labelled = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    num_labelled = len(labelled)
    # Without any label the model's own loss is taken over nothing too: leave that to the loss function.
    num_chosen = min(num_labelled, max(1, round(fraction * num_labelled)))
    chosen = labelled[torch.randperm(num_labelled, device=labelled.device)[:num_chosen]]
    hidden_nd = hidden_btd.flatten(0, -2).index_select(0, chosen)
    return hidden_nd.unsqueeze(0), labels[chosen].unsqueeze(0)


# What a head is made of.


@dataclass(frozen=True)
class ModelEnd:
    """The end of a model, as far as a head repeats it.

    Attributes:
        width: Width of the hidden state, d.
        num_outputs: Number of entries of an output, v.
        bias: Whether the unembedding has one.
        init_std: Standard deviation of the unembedding's initial weights; None for torch's own default.
        make_norm: Builds a norm like the one in front of the unembedding; None if there is none.
        tail: What follows the unembedding. It has no weights.
    """

    width: int
    num_outputs: int
    bias: bool
    init_std: float | None
    make_norm: Callable[[], nn.Module] | None
    tail: tuple[Layer, ...]


class _Function(nn.Module):
    """A plain function among modules."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Any) -> Any:
        return self.function(inputs)


def _readout(config: HeadConfig, end: ModelEnd) -> nn.Sequential:
    """Norm, unembedding and what follows it; the names of the parts are those of the checkpoint."""
    readout = nn.Sequential()
    width = end.width
    if end.make_norm is not None and config.type != "linear":
        readout.add_module("norm", end.make_norm())
    if config.type == "low_rank":
        readout.add_module("down", nn.Linear(width, config.rank, bias=False))
        width = config.rank
    unembedding = nn.Linear(width, end.num_outputs, bias=end.bias)
    if end.init_std is not None:
        nn.init.normal_(unembedding.weight, std=end.init_std)
        if unembedding.bias is not None:
            nn.init.zeros_(unembedding.bias)
    readout.add_module("unembedding", unembedding)
    for number, layer in enumerate(end.tail):
        readout.add_module(f"tail_{number}", _another_weightless(layer))
    return readout


def _another_weightless(layer: Layer) -> nn.Module:
    if isinstance(layer, LayerSpec):
        return _built(layer)
    return copy.deepcopy(layer) if isinstance(layer, nn.Module) else _Function(layer)


def _another(layer: Layer, name: str) -> nn.Module:
    """One more layer of the kind of ``layer``, with new weights.

    Raises:
        ConfigError: If ``layer`` is no block: a function, an embedding, a layer without weights.
    """
    module = _look(layer, name)
    parts = [] if module is None else [part for part in module.modules() if _has_weights(part, recurse=False)]
    if module is None or not parts or isinstance(parts[0], nn.Embedding):
        what = getattr(layer, "__name__", repr(layer)) if module is None else type(module).__name__
        raise ConfigError(
            "interlock.head.type: block_linear repeats the layer in front of the head, which must turn a "
            f"hidden state into a hidden state; {name} is {what}. Choose another type, or cut the stages "
            "elsewhere"
        )
    if isinstance(layer, LayerSpec):
        return _built(layer)
    another = copy.deepcopy(module)
    for part in another.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return another


def _built(spec: LayerSpec) -> nn.Module:
    module = spec.build()
    assert isinstance(module, nn.Module), "LayerSpec takes no other class"
    return module


def _has_weights(module: nn.Module, recurse: bool = True) -> bool:
    return next(module.parameters(recurse), None) is not None


# Finding the end of a model.


def find_model_end(layers: Sequence[Layer]) -> ModelEnd:
    """Looks for the unembedding and the norm in front of it, from the last layer forwards.

    The unembedding is the last ``nn.Linear``, or the weight of a ``TiedLayerSpec`` with a ``forward_fn``
    (an embedding used in reverse). The norm is the nearest one in front of it that is as wide.

    Raises:
        ConfigError: If there is no unembedding to be found.
    """
    tail: list[Layer] = []
    seen = _from_the_end(layers)
    for layer, module in seen:
        if module is not None and _has_weights(module):
            break
        tail.insert(0, layer)
    else:
        raise ConfigError(f"no auxiliary head can be derived: no layer has weights. {_PASS_HEAD}")
    weight, bias, parts = _unembedding(layer, module)
    num_outputs, width = weight.shape
    in_front = chain([parts], (list(other.modules()) for _, other in seen if other is not None))
    norm = next((part for parts in in_front for part in reversed(parts) if _is_norm(part, width)), None)
    return ModelEnd(
        width=width,
        num_outputs=num_outputs,
        bias=bias,
        init_std=_init_std(layer, weight),
        make_norm=None if norm is None else partial(_like, norm, width),
        tail=tuple(tail),
    )


def _from_the_end(layers: Sequence[Layer]) -> Iterator[tuple[Layer, nn.Module | None]]:
    """Each layer, the last first, with what it builds, if it builds anything; a Sequential in its parts."""
    for number in reversed(range(len(layers))):
        layer = layers[number]
        module = _look(layer, f"layer {number}")
        if type(module) is nn.Sequential:
            # The parts of a spec exist on the meta device only: as parts of the tail they have no weights,
            # and so nothing that would have to be allocated.
            yield from ((part, part) for part in reversed(module))
        else:
            yield layer, module


def _look(layer: Layer, name: str) -> nn.Module | None:
    """The module of ``layer``, built without memory if it is not there yet; None for a function."""
    if isinstance(layer, nn.Module):
        return layer
    if not isinstance(layer, LayerSpec):
        return None
    try:
        with torch.device("meta"):
            return _built(layer)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"no auxiliary head can be derived: {name}, {layer!r}, cannot be built on the meta device "
            f"({error}). {_PASS_HEAD}"
        ) from error


def _unembedding(layer: Layer, module: nn.Module) -> tuple[Tensor, bool, list[nn.Module]]:
    """Weight ``[v, d]``, presence of a bias, and the parts of ``module`` in front of the unembedding."""
    if isinstance(layer, TiedLayerSpec) and layer.forward_fn is not None:
        for attribute in layer.tied_weight_attr:
            owner, _, name = attribute.rpartition(".")
            weight = getattr(module.get_submodule(owner), name)
            if weight.dim() == 2:
                return weight, False, []
    parts = list(module.modules())
    for index in reversed(range(len(parts))):
        part = parts[index]
        if isinstance(part, nn.Linear):
            return part.weight, part.bias is not None, parts[:index]
    raise ConfigError(
        "no auxiliary head can be derived: the last layer with weights is "
        f"{type(module).__name__}, which has no nn.Linear to unembed with. {_PASS_HEAD}"
    )


def _is_norm(part: nn.Module, width: int) -> bool:
    """True for a LayerNorm or RMSNorm, torch's or a model's own class, over the last ``width`` entries."""
    if not type(part).__name__.endswith(("LayerNorm", "RMSNorm")):
        return False
    weight = getattr(part, "weight", None)
    shape = weight.shape if isinstance(weight, Tensor) else ()
    return tuple(getattr(part, "normalized_shape", shape)) == (width,)


def _like(norm: nn.Module, width: int) -> nn.Module:
    """A new norm of the class, width and eps of ``norm``, initialised as its class does it."""
    options: dict[str, Any] = {}
    takes = inspect.signature(type(norm)).parameters
    if "eps" in takes:
        options["eps"] = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if "elementwise_affine" in takes:
        options["elementwise_affine"] = getattr(norm, "weight", None) is not None
    if "bias" in takes:
        options["bias"] = getattr(norm, "bias", None) is not None
    try:
        return type(norm)(width, **options)
    except TypeError as error:
        raise ConfigError(
            f"no auxiliary head can be derived: the model's norm, {type(norm).__name__}, cannot be built "
            f"from a width and {options} ({error}). {_PASS_HEAD}"
        ) from error


def _init_std(layer: Layer, weight: Tensor) -> float | None:
    """How the model initialises its unembedding, where that can be seen; see ``ModelEnd.init_std``."""
    if isinstance(layer, LayerSpec):
        return None if layer.typename is nn.Linear else _DEFAULT_STD
    return _DEFAULT_STD if weight.is_meta else float(weight.detach().float().std())
