"""Auxiliary heads: from a hidden state inside the model to what the model's last layer would output.

A head repeats the end of the model it is for. That end is found by looking at the last layers:

    layers of the model    ... ─► block ─► block ─► norm ─► unembedding ─► (a callable)
                                    │                 └──────────┬────────────────┘
                                    │                        ModelEnd
                                    │                            │ same kinds and sizes, weights of its own
    linear                          ├─►               unembedding ─► (the callable)
    norm_linear                     ├─►        norm ─► unembedding ─► ...
    low_rank                        ├─►        norm ─► down ─► unembedding ─► ...
    block_linear                    ├─► block ─► norm ─► unembedding ─► ...
    lens                            └─► translator ─► norm* ─► unembedding* ─► ...     (*: frozen copies)

A head module may have a method ``loss(hidden, labels, loss_fn)``, which then computes its loss in
place of ``loss_fn(head(hidden), labels)``. The heads built here use it for ``token_fraction``, and to
compute the loss without all logits where the loss function knows how: where it has a method

    fused_linear(hidden, weight, bias, labels)     the same as loss_fn(F.linear(hidden, weight, bias), labels)

Shape suffixes: b batch, t position in the sequence, d hidden width, n chosen positions, v output
(vocabulary) entry. Where a suffix ends in ``td``, any number of position dimensions is meant.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_interlock.config import HeadConfig
from ds_interlock.cross_entropy import IGNORED_LABEL
from ds_interlock.errors import ConfigError
from ds_interlock.pipe.model_end import (
    PASS_HEAD,
    Layer,
    ModelEnd,
    built,
    find_model_end,
    has_weights,
    look_at,
)
from ds_interlock.schedule.plan import LossHead

LossFn = Callable[[Tensor, Tensor], Tensor]
HeadFactory = Callable[[LossHead], nn.Module]


def head_factory(config: HeadConfig, layers: Sequence[Layer]) -> HeadFactory:
    """The heads of a model whose user gave none. Looks at the model at once, builds heads when asked.

    Nothing is allocated for the look, and no random number is drawn.

    The frozen copies of a ``lens`` are made by building the model's last layers once more, when the head
    is built. Layers that draw their weights from a seed of their own, as those of ``ds_interlock.models``
    do, and layers given as modules are thus copied exactly. One that draws from the global generator (a
    plain ``LayerSpec(nn.Linear, ...)``) is drawn anew, from the head's seed: fixed, but another one than
    the model's; ``AuxiliaryHead.load_model_end`` sets other values.

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
        return AuxiliaryHead(_readout(config, end), end.width, config.token_fraction, config.fused, block)

    return make_head


class AuxiliaryHead(nn.Module):
    """A readout of the hidden state, with one more block in front of it if ``block`` is given.

    Args:
        readout: From hidden states ``[..., d]`` to outputs ``[..., v]``, each position by itself.
        width: d.
        token_fraction: Share of the labelled positions a training loss is computed on.
        fused: Let a loss function that can take unembedding and loss in one, where the readout ends in
            the unembedding.
        block: From the layers' hidden state (whatever it is) to one of the same form.
    """

    def __init__(
        self,
        readout: nn.Sequential,
        width: int,
        token_fraction: float = 1.0,
        fused: bool = True,
        block: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.readout = readout
        self.width = width
        self.token_fraction = token_fraction
        self.fused = fused

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
            return self._readout_loss(hidden_btd, labels, loss_fn)
        hidden_1nd, labels_1n = _sample_positions(hidden_btd, labels, self.token_fraction)
        return self._readout_loss(hidden_1nd, labels_1n, loss_fn)

    def load_model_end(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets norm and unembedding to the values of a model, for example a pretrained one.

        Call it before ``ds_interlock.initialize``, whose optimizers copy the weights they find.

        Args:
            tensors: ``norm.weight``, ``norm.bias``, ``unembedding.weight``, ``unembedding.bias``: those
                of them that the head has.

        Raises:
            ConfigError: If names or shapes differ from the head's.
        """
        own = {
            name: tensor
            for name, tensor in self.readout.state_dict().items()
            if name.startswith(("norm.", "unembedding."))
        }
        expected, got = ({name: tuple(t.shape) for name, t in some.items()} for some in (own, tensors))
        if expected != got:
            raise ConfigError(f"load_model_end: got {got}, expected {expected}: pass just these tensors")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def _readout_loss(self, hidden_btd: Tensor, labels: Any, loss_fn: LossFn) -> Tensor:
        *first, last = self.readout
        fused_linear = getattr(loss_fn, "fused_linear", None)
        if not (self.fused and fused_linear and isinstance(last, nn.Linear)):
            return loss_fn(self.readout(hidden_btd), labels)
        for part in first:
            hidden_btd = part(hidden_btd)
        loss: Tensor = fused_linear(hidden_btd, last.weight, last.bias, labels)
        return loss

    def _before_readout(self, hidden: Any) -> Tensor:
        hidden_btd = _first(hidden)
        if hidden_btd.shape[-1] != self.width:
            raise ConfigError(
                f"interlock.head: the hidden state is {list(hidden_btd.shape)}, but the model's unembedding "
                f"takes vectors of {self.width}, so this layer is no place for a head of type linear, "
                f"norm_linear, low_rank, block_linear or lens. {PASS_HEAD}"
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


class Translator(nn.Module):
    """An affine map of the hidden state that starts as the identity: ``[..., d]`` to ``[..., d]``.

    It turns the hidden state of a layer into the basis that a frozen unembedding reads.

    Source: Belrose et al.: Eliciting Latent Predictions from Transformers with the Tuned Lens,
    arXiv 2303.08112, 2023, section 3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Linear(width, width)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return hidden_btd + self.change(hidden_btd)  # type: ignore[no-any-return]


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
    if config.type == "lens":
        readout.add_module("translator", Translator(end.width))
        if end.copy_norm is not None:
            readout.add_module("norm", end.copy_norm())
        readout.add_module("unembedding", end.copy_unembedding())
    else:
        width = end.width
        if end.make_norm is not None and config.type != "linear":
            readout.add_module("norm", end.make_norm())
        if config.type == "low_rank":
            readout.add_module("down", nn.Linear(width, config.rank, bias=False))
            width = config.rank
        readout.add_module("unembedding", _new_unembedding(width, end))
    for number, layer in enumerate(end.tail):
        readout.add_module(f"tail_{number}", _another_weightless(layer))
    return readout


def _new_unembedding(width: int, end: ModelEnd) -> nn.Linear:
    unembedding = nn.Linear(width, end.num_outputs, bias=end.bias)
    if end.init_std is not None:
        nn.init.normal_(unembedding.weight, std=end.init_std)
        if end.bias:
            nn.init.zeros_(unembedding.bias)
    return unembedding


def _another_weightless(layer: Layer) -> nn.Module:
    if isinstance(layer, LayerSpec):
        return built(layer)
    return copy.deepcopy(layer) if isinstance(layer, nn.Module) else _Function(layer)


def _another(layer: Layer, name: str) -> nn.Module:
    """One more layer of the kind of ``layer``, with new weights.

    Raises:
        ConfigError: If ``layer`` is no block: a function, an embedding, a layer without weights.
    """
    module = look_at(layer, name)
    parts = [] if module is None else [part for part in module.modules() if has_weights(part, recurse=False)]
    if module is None or not parts or isinstance(parts[0], nn.Embedding):
        what = getattr(layer, "__name__", repr(layer)) if module is None else type(module).__name__
        raise ConfigError(
            "interlock.head.type: block_linear repeats the layer in front of the head, which must turn a "
            f"hidden state into a hidden state; {name} is {what}. Choose another type, or cut the stages "
            "elsewhere"
        )
    if isinstance(layer, LayerSpec):
        return built(layer)
    another = copy.deepcopy(module)
    for part in another.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return another
