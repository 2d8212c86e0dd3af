"""What an auxiliary head is made of: the parts between the hidden state and the outputs.

The names of the parts are those of the checkpoint: ``translator``, ``norm``, ``temperature``, ``down``,
``unembedding``, and ``tail_0`` ... for what the model does to the outputs of its unembedding.

Shape suffixes: b batch, t position in the sequence, d hidden width.
"""

import copy
from collections import OrderedDict

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_interlock.config import HeadConfig
from ds_interlock.errors import ConfigError
from ds_interlock.heads.output_layers import Function, Layer, OutputLayers, build, has_weights, look_at
from ds_interlock.stage.shared_readout import SharedUnembedding

UNEMBEDDING = "unembedding"


def make_readout(config: HeadConfig, output_layers: OutputLayers) -> nn.Sequential:
    """Norm, unembedding and what follows it, as ``config.type`` says."""
    make = {"lens": _lens, "shared": _shared}.get(config.type, _new_parts)
    parts = make(config, output_layers)
    tail = {f"tail_{number}": _another_weightless(layer) for number, layer in enumerate(output_layers.tail)}
    return nn.Sequential(OrderedDict(parts | tail))


def _lens(config: HeadConfig, output_layers: OutputLayers) -> dict[str, nn.Module]:
    """A translator before or after the frozen norm.

    After the norm, ``unembedding(translator(x))`` is an unembedding again; the constant that a bias adds
    needs a bias of the norm or the unembedding to go into.
    """
    norm = {"norm": output_layers.copy_norm()} if output_layers.copy_norm else {}
    unembedding = {UNEMBEDDING: output_layers.copy_unembedding()}
    if config.translator == "before_norm":
        return {"translator": Translator(output_layers.width), **norm, **unembedding}
    has_bias = any(getattr(part, "bias", None) is not None for part in (norm | unembedding).values())
    return {**norm, "translator": Translator(output_layers.width, bias=has_bias), **unembedding}


def _shared(config: HeadConfig, output_layers: OutputLayers) -> dict[str, nn.Module]:
    """A norm of its own, at first the model's, and a temperature before copies of the live unembedding."""
    norm = {"norm": output_layers.copy_norm().requires_grad_(True)} if output_layers.copy_norm else {}
    copy = output_layers.copy_unembedding()
    weights = (copy.weight,) if copy.bias is None else (copy.weight, copy.bias)
    unembedding = SharedUnembedding(weights, output_layers.source, config.refresh_every)
    return {**norm, "temperature": Temperature(), UNEMBEDDING: unembedding}


def _new_parts(config: HeadConfig, output_layers: OutputLayers) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {}
    width, std = output_layers.width, output_layers.init_std
    if output_layers.make_norm is not None and config.type != "linear":
        parts["norm"] = output_layers.make_norm()
    if config.type == "low_rank":
        parts["down"] = nn.Linear(width, config.rank, bias=False)
        width = config.rank
    parts[UNEMBEDDING] = unembedding = nn.Linear(width, output_layers.num_outputs, bias=output_layers.bias)
    if std is not None:
        nn.init.normal_(unembedding.weight, std=std)
        if output_layers.bias:
            nn.init.zeros_(unembedding.bias)
    return parts


class Translator(nn.Module):
    """An affine map of the hidden state, at first the identity, into the basis that an unembedding reads.

    Source: Belrose et al.: Eliciting Latent Predictions from Transformers with the Tuned Lens,
    arXiv 2303.08112, 2023, section 3.
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.change = nn.Linear(width, width, bias=bias)
        for parameter in self.change.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return hidden_btd + self.change(hidden_btd)  # type: ignore[no-any-return]


class Temperature(nn.Module):
    """A factor of the hidden state, and so of the outputs but for a bias; at first 1.

    It is the exponential of what is learned, so that weight decay pulls it towards 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return hidden_btd * self.log_scale.exp()


def _another_weightless(layer: Layer) -> nn.Module:
    if isinstance(layer, LayerSpec):
        return build(layer)
    return copy.deepcopy(layer) if isinstance(layer, nn.Module) else Function(layer)


def another_like(layer: Layer, name: str) -> nn.Module:
    """One more layer of the kind of ``layer``; ConfigError if it is no block.

    It starts as the model's own initialisation says, which ``reset_parameters`` would not know: a module is
    copied, weights included, and a specification is built once more.
    """
    module = look_at(layer, name)
    parts = [part for part in module.modules() if has_weights(part, recurse=False)]
    if not parts or isinstance(parts[0], nn.Embedding):
        what = getattr(layer, "__name__", type(module).__name__)
        raise ConfigError(
            "interlock.head.blocks: they repeat the layer before the head, which must turn a hidden state "
            f"into a hidden state; {name} is {what}. Set it to 0, or cut the stages elsewhere"
        )
    return build(layer) if isinstance(layer, LayerSpec) else copy.deepcopy(module)
