"""Auxiliary heads: from a hidden state inside the model to what the model's last layer would output.

A head repeats the output layers of its model, which are found from the last layer backwards:

    layers of the model    ... ─► block ─► block ─► norm ─► unembedding ─► (a callable)
                                    │                 └──────────┬────────────────┘
                                    │                      OutputLayers
                                    │                            │ same kinds and sizes, weights of its own
    linear                          ├─►               unembedding ─► (the callable)
    norm_linear                     ├─►        norm ─► unembedding ─► ...
    low_rank                        ├─►        norm ─► down ─► unembedding ─► ...
    lens                            ├─► norm* ─► translator ─► unembedding* ─► ...     (*: frozen copies)
    shared                          ├─► norm ─► temperature ─► unembedding' ─► ...     (': a live copy)
    any of them, with blocks: 2     └─► block ─► block ─► norm ─► unembedding ─► ...

A head's method ``loss(hidden, labels, loss_fn)`` is used in place of ``loss_fn(head(hidden), labels)``: for
``sequence_fraction``, ``token_fraction``, ``objective``, and without all logits where the loss function has
a method

    fused_linear(hidden, weight, bias, labels)     the same as loss_fn(F.linear(hidden, weight, bias), labels)

Shape suffixes: b batch, t position (any number of dimensions), d hidden width, n chosen positions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ds_interlock.config import HeadConfig
from ds_interlock.config.section import Objective
from ds_interlock.errors import ConfigError
from ds_interlock.heads.divergence import kl_divergence, relative_error
from ds_interlock.heads.labels import Labels
from ds_interlock.heads.output_layers import PASS_HEAD, Layer, OutputLayers, find_output_layers, first_tensor
from ds_interlock.heads.readout import UNEMBEDDING, another_like, make_readout
from ds_interlock.heads.samples import at, labelled_positions, sample_positions, sample_sequences
from ds_interlock.schedule.plan import LossHead

LossFn = Callable[[Tensor, Any], Tensor]

_NO_BASE = {
    "kl": 'interlock.head.objective: "kl" needs labels that are a tuple (labels, normaliser, base), base '
    "being the base model's hidden states before its unembedding, {}: let the data bring them, as the job "
    'finetune does, or set it to "cross_entropy"',
    "reconstruction": 'interlock.head.objective: "reconstruction" needs the hidden states {} that the head '
    'read before training, which only the job finetune records: use that, or set it to "cross_entropy"',
}
HeadFactory = Callable[[LossHead], nn.Module]


def block_parameters(head: nn.Module) -> list[nn.Parameter]:
    """The parameters of a head's blocks, which learn at the model's rate; none of a head of the user's."""
    return list(head.blocks.parameters()) if isinstance(head, AuxiliaryHead) else []


def _last_layer(after_layer: int) -> range:
    return range(after_layer - 1, after_layer)


def head_factory(
    config: HeadConfig,
    layers: Sequence[Layer],
    pretrained: bool = False,
    *,
    block: Callable[[int], range] = _last_layer,
) -> HeadFactory:
    """The heads of a model whose user passes none. Looks at the model at once, builds heads when called.

    The frozen copies of a ``lens``, and what a ``shared`` head starts from, are made by building the model's
    last layers once more, when the head is built. Layers with a seed of their own, as those of
    ``ds_interlock.models``, and layers that are modules are thus copied exactly. One that draws from the
    global generator (a plain ``LayerSpec(nn.Linear, ...)``) is drawn again, from the head's seed: fixed, but
    not as in the model.

    Args:
        config: The section ``"interlock.head"``.
        layers: All layers of the model, as passed to ``PipelineModule``.
        pretrained: Whether the model's weights are those of a trained model: what type ``auto`` goes by.
        block: The numbers of the layers that one of a head's ``blocks`` repeats, by its ``after_layer``; by
            default the layer before it.

    Raises:
        ConfigError: If the output layers are not found, or objective ``kl`` finds no lens.
    """
    config = config.resolve(pretrained=pretrained)
    if "kl" in config.objectives and config.type != "lens":
        raise ConfigError(
            'interlock.head.objective: "kl" needs a lens, but type auto means '
            f'{config.type} for a model that is not pretrained; set interlock.head.type to "lens", or pass '
            "pretrained=True with a pretrained model"
        )
    output_layers = find_output_layers(layers)

    def make_head(head: LossHead) -> nn.Module:
        blocks = [
            another_like(layers[number], f"layer {number}")
            for _ in range(config.blocks_at(head.stage))
            for number in block(head.after_layer)
        ]
        return AuxiliaryHead(make_readout(config, output_layers), output_layers, config, blocks)

    return make_head


class AuxiliaryHead(nn.Module):
    """A readout of the hidden state of width d, after blocks of the model's kind if there are ``blocks``.

    ``readout`` turns hidden states ``[..., d]`` into outputs ``[..., v]``, each position by itself; its part
    ``unembedding`` makes the outputs, in a tuple if ``output_layers`` do.

    ``base_states``, if the data bring places ``[n]`` in them (``ds_interlock.heads.labels``), turns these
    into the base model's states ``[n, d]`` that each objective needs: the last ones for ``kl``, those that
    this head reads for ``reconstruction``.
    """

    def __init__(
        self,
        readout: nn.Sequential,
        output_layers: OutputLayers,
        config: HeadConfig,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.readout = readout
        self.width = output_layers.width
        self.in_tuple = output_layers.in_tuple
        self.config = config
        self.base_states: Mapping[str, Callable[[Tensor], Tensor]] = {}
        self._unembedding_at = [name for name, _ in readout.named_children()].index(UNEMBEDDING)

    def forward(self, hidden: Any) -> Any:
        """What the model would output if it ended at ``hidden``: a tensor, or a tuple starting with it."""
        return self._unembed(self._to_unembedding(self._before_readout(hidden)))

    def loss(self, hidden: Any, labels: Any, loss_fn: LossFn) -> Tensor:
        """The loss of this head: in evaluation the model's loss, in training what the head learns from.

        Where nothing but the head learns, which its hidden state shows by taking no gradient, a head of
        ``reconstruction`` alone learns from the model's loss: the layers are what reconstruction trains.

        For all but the model's loss the labels have a form of ``ds_interlock.heads.labels``: for
        ``sequence_fraction`` with a row for each sequence, for ``token_fraction`` and for what the base model
        says with one label for each position. If some are drawn, ``loss_fn`` must average over those labelled
        other than -100. Reconstruction, which costs next to nothing, takes all positions of the sequences.

        Raises:
            ConfigError: If ``labels`` lack what ``config`` asks for.
        """
        if not self.training:
            return self._cross_entropy(self._to_unembedding(self._before_readout(hidden)), labels, loss_fn)
        if self.config.sequence_fraction < 1:
            hidden, labels = sample_sequences(hidden, labels, self.config.sequence_fraction)
        factors = dict(self.config.objectives)
        factor = factors.pop("reconstruction", 0.0)
        if factor and not factors and not first_tensor(hidden).requires_grad:
            factor, factors = 0.0, {"cross_entropy": 1.0}
        losses = self._losses_of_outputs(hidden, labels, loss_fn, factors) if factors else []
        if factor:
            losses.append(factor * self._reconstruction(first_tensor(hidden), labels))
        return sum(losses[1:], start=losses[0])

    def _losses_of_outputs(
        self, hidden: Any, labels: Any, loss_fn: LossFn, factors: Mapping[Objective, float]
    ) -> list[Tensor]:
        hidden_btd = self._before_readout(hidden)
        if self.config.token_fraction < 1:
            hidden_btd, labels = sample_positions(hidden_btd, labels, self.config.token_fraction)
        hidden_btd = self._to_unembedding(hidden_btd)
        losses = []
        if factor := factors.get("cross_entropy"):
            losses.append(factor * self._cross_entropy(hidden_btd, labels, loss_fn))
        if factor := factors.get("kl"):
            losses.append(factor * self._divergence(hidden_btd, labels))
        return losses

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
        hidden_nd, base_nd, divisor = self._beside_base("kl", hidden_btd, labels)
        num_outputs = cast(nn.Linear, self.readout[self._unembedding_at]).out_features
        divergence = kl_divergence(
            hidden_nd, base_nd, lambda hidden_nd: first_tensor(self._unembed(hidden_nd)), num_outputs
        )
        return divergence / divisor

    def _reconstruction(self, hidden_btd: Tensor, labels: Any) -> Tensor:
        """The relative error of what the head reads at the labelled positions, divided as the divergence."""
        hidden_nd, base_nd, divisor = self._beside_base("reconstruction", hidden_btd, labels)
        return relative_error(hidden_nd, base_nd) / divisor

    def _beside_base(self, objective: str, hidden_btd: Tensor, labels: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states at the labelled positions, those of the base model, what the loss is divided by."""
        parts = Labels.parse(labels)
        base = None if parts is None else parts.base
        places = base is not None and not base.is_floating_point() and objective in self.base_states
        if (
            parts is None
            or base is None
            or not (places or (objective == "kl" and base.shape == hidden_btd.shape))
        ):
            raise ConfigError(_NO_BASE[objective].format(list(hidden_btd.shape)))
        labelled = labelled_positions(parts.labels)
        base_nd = parts.base_at(labelled)
        if places:
            base_nd = self.base_states[objective](base_nd)
        hidden_nd = at(labelled, hidden_btd)
        return hidden_nd, base_nd.to(hidden_nd), parts.divisor

    def _before_readout(self, hidden: Any) -> Tensor:
        hidden_btd = first_tensor(hidden)
        if hidden_btd.shape[-1] != self.width:
            raise ConfigError(
                f"interlock.head: the hidden state is {list(hidden_btd.shape)}, but the model's unembedding "
                f"takes vectors of {self.width}, so no built-in head can follow this layer. {PASS_HEAD}"
            )
        for block in self.blocks:
            hidden = block(hidden)
            if (shape := first_tensor(hidden).shape) != hidden_btd.shape:
                raise ConfigError(
                    "interlock.head.blocks: they need a layer before the head that keeps the hidden state's "
                    f"shape, but {type(block).__name__} turns {list(hidden_btd.shape)} into {list(shape)}; "
                    "set it to 0"
                )
        return first_tensor(hidden)
