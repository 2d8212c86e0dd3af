"""Auxiliary heads: from a hidden state inside the model to what the model's last layer would output.

A head repeats the output layers of its model, which are found from the last layer backwards:

    layers of the model    ... ─► block ─► block ─► norm ─► unembedding ─► (a callable)
                                    │                 └──────────┬────────────────┘
                                    │                      OutputLayers
                                    │                            │ same kinds and sizes, weights of its own
    linear                          ├─►               unembedding ─► (the callable)
    norm_linear                     ├─►        norm ─► unembedding ─► ...
    low_rank                        ├─►        norm ─► down ─► unembedding ─► ...
    block_linear                    ├─► block ─► norm ─► unembedding ─► ...
    lens                            └─► norm* ─► translator ─► unembedding* ─► ...     (*: frozen copies)

A head's method ``loss(hidden, labels, loss_fn)`` is used in place of ``loss_fn(head(hidden), labels)``: for
``token_fraction``, for ``kl_weight``, and without all logits where the loss function has a method

    fused_linear(hidden, weight, bias, labels)     the same as loss_fn(F.linear(hidden, weight, bias), labels)

Shape suffixes: b batch, t position (any number of dimensions), d hidden width, n chosen positions.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_interlock.config import HeadConfig
from ds_interlock.errors import ConfigError
from ds_interlock.heads.divergence import kl_divergence
from ds_interlock.heads.labels import IGNORED_LABEL, Labels
from ds_interlock.heads.output_layers import PASS_HEAD, Layer, OutputLayers, find_output_layers, first_tensor
from ds_interlock.heads.readout import UNEMBEDDING, another_like, make_readout
from ds_interlock.schedule.plan import LossHead

LossFn = Callable[[Tensor, Any], Tensor]
HeadFactory = Callable[[LossHead], nn.Module]


def head_factory(config: HeadConfig, layers: Sequence[Layer], pretrained: bool = False) -> HeadFactory:
    """The heads of a model whose user passes none. Looks at the model at once, builds heads when called.

    The frozen copies of a ``lens`` are made by building the model's last layers once more, when the head
    is built. Layers with a seed of their own, as those of ``ds_interlock.models``, and layers that are
    modules are thus copied exactly. One that draws from the global generator (a plain
    ``LayerSpec(nn.Linear, ...)``) is drawn again, from the head's seed: fixed, but not as in the model.

    Args:
        config: The section ``"interlock.head"``.
        layers: All layers of the model, as passed to ``PipelineModule``.
        pretrained: Whether the model's weights are those of a trained model: what type ``auto`` goes by.

    Raises:
        ConfigError: If the output layers are not found, or ``kl_weight`` finds no lens.
    """
    config = config.resolve(pretrained=pretrained)
    if config.kl_weight > 0 and config.type != "lens":
        raise ConfigError(
            f"interlock.head.kl_weight: {config.kl_weight:g} needs a lens, but type auto means "
            f'{config.type} for a model that is not pretrained; set interlock.head.type to "lens", or pass '
            "pretrained=True with a pretrained model"
        )
    output_layers = find_output_layers(layers)

    def make_head(head: LossHead) -> nn.Module:
        block = None
        if config.type == "block_linear":
            block = another_like(layers[head.after_layer - 1], f"layer {head.after_layer - 1}")
        return AuxiliaryHead(make_readout(config, output_layers), output_layers, config, block)

    return make_head


class AuxiliaryHead(nn.Module):
    """A readout of the hidden state of width d, after one more block if there is a ``block``.

    ``readout`` turns hidden states ``[..., d]`` into outputs ``[..., v]``, each position by itself; its part
    ``unembedding`` makes the outputs, in a tuple if ``output_layers`` do.
    """

    def __init__(
        self, readout: nn.Sequential, output_layers: OutputLayers, config: HeadConfig, block: nn.Module | None
    ) -> None:
        super().__init__()
        self.block = block
        self.readout = readout
        self.width = output_layers.width
        self.in_tuple = output_layers.in_tuple
        self.config = config
        self._unembedding_at = [name for name, _ in readout.named_children()].index(UNEMBEDDING)

    def forward(self, hidden: Any) -> Any:
        """What the model would output if it ended at ``hidden``: a tensor, or a tuple starting with it."""
        return self._unembed(self._to_unembedding(self._before_readout(hidden)))

    def loss(self, hidden: Any, labels: Any, loss_fn: LossFn) -> Tensor:
        """The loss of this head: in evaluation the model's loss, in training what the head learns from.

        That is the model's loss, the divergence from the base model, or both, as ``config`` weights them.

        For ``token_fraction`` and ``kl_weight`` the labels have a form of ``ds_interlock.heads.labels``, with
        one label for each position. If positions are sampled, ``loss_fn`` must average over those labelled
        other than -100.

        Raises:
            ConfigError: If ``labels`` lack what ``config`` asks for.
        """
        hidden_btd = self._before_readout(hidden)
        if not self.training:
            return self._cross_entropy(self._to_unembedding(hidden_btd), labels, loss_fn)
        if self.config.token_fraction < 1:
            hidden_btd, labels = _sample_positions(hidden_btd, labels, self.config.token_fraction)
        hidden_btd = self._to_unembedding(hidden_btd)
        losses = []
        if self.config.cross_entropy_weight > 0:
            losses.append(self.config.cross_entropy_weight * self._cross_entropy(hidden_btd, labels, loss_fn))
        if self.config.kl_weight > 0:
            losses.append(self.config.kl_weight * self._divergence(hidden_btd, labels))
        return sum(losses[1:], start=losses[0])

    def _to_unembedding(self, hidden_btd: Tensor) -> Tensor:
        return cast(Tensor, self.readout[: self._unembedding_at](hidden_btd))

    def _unembed(self, hidden_btd: Tensor) -> Any:
        """Outputs of what ``_to_unembedding`` returns."""
        outputs = self.readout[self._unembedding_at](hidden_btd)
        return self.readout[self._unembedding_at + 1 :]((outputs,) if self.in_tuple else outputs)

    def _cross_entropy(self, hidden_btd: Tensor, labels: Any, loss_fn: LossFn) -> Tensor:
        """The model's loss, from what ``_to_unembedding`` returns."""
        last = self.readout[-1]
        fused_linear = getattr(loss_fn, "fused_linear", None)
        if self.config.fused and fused_linear and isinstance(last, nn.Linear):
            return cast(Tensor, fused_linear(hidden_btd, last.weight, last.bias, labels))
        return loss_fn(self._unembed(hidden_btd), labels)

    def _divergence(self, hidden_btd: Tensor, labels: Any) -> Tensor:
        """KL(base || head) at the labelled positions, divided by their normaliser."""
        parts = Labels.parse(labels)
        if parts is None or parts.base is None or parts.base.shape != hidden_btd.shape:
            raise ConfigError(
                f"interlock.head.kl_weight: {self.config.kl_weight:g} needs labels that are a tuple (labels, "
                "normaliser, base), base being the base model's hidden states before its unembedding, "
                f"{list(hidden_btd.shape)}; set it to 0, or let the data bring them"
            )
        num_outputs = cast(nn.Linear, self.readout[self._unembedding_at]).out_features
        labelled = _labelled_positions(parts.labels)
        hidden_nd, base_nd = _at(labelled, hidden_btd), _at(labelled, parts.base).to(hidden_btd.dtype)
        divergence = kl_divergence(
            hidden_nd, base_nd, lambda hidden_nd: first_tensor(self._unembed(hidden_nd)), num_outputs
        )
        return divergence / parts.divisor

    def _before_readout(self, hidden: Any) -> Tensor:
        hidden_btd = first_tensor(hidden)
        if hidden_btd.shape[-1] != self.width:
            raise ConfigError(
                f"interlock.head: the hidden state is {list(hidden_btd.shape)}, but the model's unembedding "
                f"takes vectors of {self.width}, so no built-in head can follow this layer. {PASS_HEAD}"
            )
        if self.block is None:
            return hidden_btd
        after = first_tensor(self.block(hidden))
        if after.shape != hidden_btd.shape:
            raise ConfigError(
                f"interlock.head.type: block_linear needs a layer before the head that keeps the hidden "
                f"state's shape, but {type(self.block).__name__} turns {list(hidden_btd.shape)} into "
                f"{list(after.shape)}; choose another type"
            )
        return after


def _sample_positions(hidden_btd: Tensor, labels: Any, fraction: float) -> tuple[Tensor, Any]:
    """A random share of the labelled positions, as one sequence ``[1, n, d]`` with its labels.

    Drawn from the device's global generator, whose state is part of a checkpoint. A mean over the share is
    an unbiased estimate of the mean over all; so is a sum divided by a normaliser that shrinks as much.
    """
    parts = Labels.parse(labels)
    if parts is None or parts.labels.shape != hidden_btd.shape[:-1]:
        got = type(labels).__name__ if parts is None else list(parts.labels.shape)
        raise ConfigError(
            f"interlock.head.token_fraction: {fraction} needs one label for each position, a tensor "
            f"{list(hidden_btd.shape[:-1])} for states {list(hidden_btd.shape)}, not {got}; set it to 1"
        )
    labelled = _labelled_positions(parts.labels)
    num_labelled = len(labelled)
    # Without any label the model's own loss is taken over nothing too: leave that to the loss function.
    num_chosen = min(num_labelled, max(1, round(fraction * num_labelled)))
    chosen = labelled[torch.randperm(num_labelled, device=labelled.device)[:num_chosen]]
    share = num_chosen / num_labelled if num_labelled else 1.0
    sampled = Labels(
        parts.labels.flatten()[chosen].unsqueeze(0),
        None if parts.normaliser is None else parts.normaliser * share,
        None if parts.base is None else _at(chosen, parts.base).unsqueeze(0),
    )
    return _at(chosen, hidden_btd).unsqueeze(0), sampled.compact


def _at(positions_n: Tensor, hidden_btd: Tensor) -> Tensor:
    """The hidden states at some positions, counted through the micro-batch: ``[n, d]``."""
    return hidden_btd.flatten(0, -2).index_select(0, positions_n)


def _labelled_positions(labels_bt: Tensor) -> Tensor:
    return (labels_bt.flatten() != IGNORED_LABEL).nonzero().squeeze(1)
