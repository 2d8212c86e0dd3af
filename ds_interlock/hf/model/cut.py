"""The layers that a Hugging Face model is cut into, as ``PipelineModule`` wants them.

    layer 0        Front         ids_bt, ...  -> hidden_btd
    layer 1..      Block         hidden_btd   -> hidden_btd
    then           End           hidden_btd   -> hidden_btd, or a classifier's logits_bc
    then           Unembedding   hidden_btd   -> logits_btv
    perhaps        Bias          logits_btv   -> logits_btv      beside a tied weight
    perhaps        Logits        logits_btv   -> logits_btv      soft-capped or scaled, where a model does it

Masks and positions travel beside the hidden state, as integers, where the data has them; behind them what a
block needs of the front or of the block before it (``Anatomy.beside``), and of the balance of experts
(``routing.py``). Parameters have their full Hugging Face names (``7.model.layers.6.mlp.up_proj.weight``): the
files of a pipeline checkpoint together are the state dict of the model.

Shape suffixes: b batch, t position, d hidden width, v vocabulary, c class.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.anatomy import Source
from ds_interlock.hf.model.routing import Routing
from ds_interlock.hf.model.surgery import Arguments, Skeleton

TIE = "embedding"  # key of the tied weights, as ``TiedLayerSpec`` has it
_TRAVELS = ("attention_mask", "position_ids")

Values: TypeAlias = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From a part of a model's state dict on the meta device to those of its values that exist."""

Hidden: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Blueprint:
    """Everything that a process needs to build its layers.

    ``inputs`` are those of stage 0, in order: ``input_ids`` and perhaps ``attention_mask``, ``position_ids``,
    ``token_type_ids``, ``[b, t]`` each.
    """

    skeleton: Skeleton
    values: Values  # reads the weights when a layer is built
    inputs: tuple[str, ...] = ("input_ids",)
    tie: bool = True  # a tied unembedding stays tied in training; frozen ones need no tie
    routing: Routing | None = None  # if the balance of experts is part of the loss
    prepare: list[Callable[[nn.Module], None]] = field(default_factory=list)
    """Called with each layer once it has its weights: adapters, freezing."""

    @property
    def context(self) -> tuple[str, ...]:
        """What travels beside the hidden state."""
        anatomy = self.skeleton.anatomy
        # A decoder that classifies looks for its last token that is no padding.
        needed = ("input_ids",) if anatomy.needs_ids or anatomy.unembedding is None else ()
        return tuple(name for name in self.inputs if name in (*_TRAVELS, *needed))

    @cached_property
    def outline(self) -> list[nn.Module]:
        """All layers without weights; a tied unembedding as the module it is on its own stage."""
        specs = self.layers()
        with torch.device("meta"):
            return [spec.build() for spec in specs]

    def parameters(self) -> dict[str, Tensor]:
        """The model's parameters by name, on the meta device, in the order of its layers; a tied one once."""
        return {name: tensor for layer in self.outline for name, tensor in layer.named_parameters()}

    def layers(self) -> list[LayerSpec]:
        """The whole model as layer specifications; see the picture at the top of the file."""
        anatomy = self.skeleton.anatomy
        blocks = (LayerSpec(Block, self, index) for index in range(anatomy.num_blocks))
        specs = [LayerSpec(Front, self), *blocks, LayerSpec(End, self)]
        if anatomy.unembedding is None:
            return specs
        if anatomy.tied and self.tie:
            weight = f"{anatomy.embedding}.weight"
            tied = partial(TiedLayerSpec, TIE, tied_weight_attr=weight)
            specs[0] = tied(Front, self)
            specs.append(tied(Embedding, self, forward_fn=partial(unembed, weight)))
            if self.skeleton.original(f"{anatomy.unembedding}").bias is not None:
                specs.append(LayerSpec(Bias, self))
        else:
            specs.append(LayerSpec(Unembedding, self))
        if self.skeleton.changes_logits():
            specs.append(LayerSpec(Logits, self))
        return specs


def build_all(specs: Sequence[LayerSpec]) -> list[Callable[[Any], Any]]:
    """The whole model in one process. A tied layer's second use is a function over the first's module."""
    tied: dict[str, nn.Module] = {}
    layers: list[Callable[[Any], Any]] = []
    for spec in specs:
        if not isinstance(spec, TiedLayerSpec):
            layers.append(spec.build())
            continue
        if spec.key not in tied:
            tied[spec.key] = spec.build()
        first = tied[spec.key]
        layers.append(first if spec.forward_fn is None else partial(spec.forward_fn, first))
    return layers


def in_parts(hidden: Hidden) -> tuple[Tensor, ...]:
    """A hidden state and what travels beside it."""
    return (hidden,) if isinstance(hidden, Tensor) else hidden


def joined(hidden_btd: Tensor, *beside: Tensor) -> Hidden:
    """A hidden state with what travels beside it; alone if nothing does."""
    return (hidden_btd, *beside) if beside else hidden_btd


class HFLayer(nn.Module):
    """Some of a model's modules (``paths``) under their own names, with their weights (none on meta)."""

    part: str  # which modules, as the model's ``Anatomy`` calls them

    def __init__(self, blueprint: Blueprint, paths: Sequence[str] | None = None) -> None:
        super().__init__()
        self.blueprint = blueprint
        if paths is None:
            named = getattr(blueprint.skeleton.anatomy, self.part)
            paths = [named] if isinstance(named, str) else named
        self.paths = tuple(paths)
        for path in paths:
            owner: nn.Module = self
            *owners, name = path.split(".")
            for part in owners:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.add_module(name, self._copy(blueprint.skeleton.original(path)))
        if torch.get_default_device().type != "meta":
            self._fill()

    def _copy(self, original: nn.Module) -> nn.Module:
        return copy.deepcopy(original)

    def parts(self) -> dict[str, nn.Module]:
        """The modules by name."""
        return {path: self.get_submodule(path) for path in self.paths}

    def split(self, hidden: Hidden) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        """The hidden state; masks and positions by name; and what else travels."""
        if isinstance(hidden, Tensor):
            return hidden, {}, ()
        names = self.blueprint.context
        context = dict(zip(names, hidden[1:], strict=False))
        return hidden[0], context, hidden[1 + len(names) :]

    def _fill(self) -> None:
        own = self.state_dict()
        tensors = dict(self.blueprint.values(own))
        # A buffer that no checkpoint has keeps the value that the model's own code gave it.
        tensors |= {name: own[name] for name in own.keys() - tensors.keys() if not own[name].is_meta}
        missing = own.keys() - tensors.keys()
        if missing:
            raise ConfigError(f"--model: its weights lack {', '.join(sorted(missing))}")
        self.load_state_dict(tensors, assign=True)
        for prepare in self.blueprint.prepare:
            prepare(self)


class Front(HFLayer):
    """Everything before the blocks: from the inputs to the hidden state (and what travels beside it)."""

    part = "front"

    def forward(self, inputs: Hidden) -> Hidden:
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        by_name = dict(zip(self.blueprint.inputs, tensors, strict=True))
        hidden_btd, *beside = self.blueprint.skeleton.front(self.parts(), by_name)
        context = tuple(by_name[name] for name in self.blueprint.context)
        routing = self.blueprint.routing
        return joined(hidden_btd, *context, *beside, *([routing.begin(hidden_btd)] if routing else []))


class Block(HFLayer):
    """One of the model's own blocks."""

    def __init__(self, blueprint: Blueprint, index: int) -> None:
        self.index = index
        super().__init__(blueprint, [f"{blueprint.skeleton.anatomy.blocks}.{index}"])

    def forward(self, hidden: Hidden) -> Hidden:
        hidden_btd, context, others = self.split(hidden)
        sources = self.blueprint.skeleton.anatomy.travels_into(self.index)
        beside, sums = dict(zip(sources, others, strict=False)), others[len(sources) :]
        inputs, options = self._arguments(hidden_btd, context, beside)
        (block,) = self.parts().values()
        routing, logits = self.blueprint.routing, list[Tensor]()
        with routing.watch(block) if routing else nullcontext(logits) as logits:
            result = block(hidden_btd, *inputs, **options)
        hidden_btd = result[0] if isinstance(result, tuple | list) else result
        if routing and sums:
            batch, mask_bt = len(hidden_btd), context.get("attention_mask")
            sums = (sum((routing.share(each, batch, mask_bt) for each in logits), start=sums[0]),)
        return joined(hidden_btd, *context.values(), *self._next(beside, result), *sums)

    def _arguments(
        self, hidden_btd: Tensor, context: Mapping[str, Tensor], beside: Mapping[Source, Tensor]
    ) -> Arguments:
        skeleton = self.blueprint.skeleton
        arguments = skeleton.arguments(self.index, hidden_btd, context)
        if not beside:
            return arguments
        leaves, form = tree_flatten(arguments)
        for number, source in skeleton.anatomy.beside[self.index].items():
            leaves[number] = beside[source]
        return cast(Arguments, tree_unflatten(leaves, form))

    def _next(self, beside: Mapping[Source, Tensor], result: Any) -> list[Tensor]:
        """What the blocks after this one need beside the hidden state."""
        sources = self.blueprint.skeleton.anatomy.travels_into(self.index + 1)
        values = [beside[source] if source.is_front else result[source.number] for source in sources]
        if not all(isinstance(value, Tensor) for value in values):
            raise ConfigError(f"--model: {self.paths[0]} returns less than the next block expects of it")
        return values


class End(HFLayer):
    """Everything after the blocks but the unembedding: the final norm, or pooling and classifier."""

    part = "end"

    def forward(self, hidden: Hidden) -> Hidden:
        hidden_btd, context, sums = self.split(hidden)
        return joined(self.blueprint.skeleton.end(self.parts(), hidden_btd, context, self.training), *sums)


class Unembedding(HFLayer):
    """From the hidden state to logits."""

    part = "unembedding"

    def forward(self, hidden: Hidden) -> Hidden:
        hidden_btd, *sums = in_parts(hidden)
        (unembedding,) = self.parts().values()
        return joined(unembedding(hidden_btd), *sums)


class Bias(HFLayer):
    """The bias of an unembedding whose weight is the token embedding's."""

    part = "unembedding"

    def _copy(self, original: nn.Module) -> nn.Module:
        module = super()._copy(original)
        del module.weight
        return module

    def forward(self, outputs: Hidden) -> Hidden:
        logits_btv, *sums = in_parts(outputs)
        (unembedding,) = self.parts().values()
        return joined(logits_btv + cast(Tensor, unembedding.bias), *sums)


class Embedding(HFLayer):
    """A copy of the token embedding that is the tied unembedding on another stage."""

    part = "embedding"


def unembed(weight_name: str, embedding: nn.Module, hidden: Hidden) -> Hidden:
    """logits_btv by the embedding's weight; the ``forward_fn`` of a tied unembedding."""
    hidden_btd, *sums = in_parts(hidden)
    owner, _, attribute = weight_name.rpartition(".")
    return joined(F.linear(hidden_btd, getattr(embedding.get_submodule(owner), attribute)), *sums)


class Logits(nn.Module):
    """The model's last step on its logits: soft-capping, scaling."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.blueprint = blueprint

    def forward(self, outputs: Hidden) -> Hidden:
        logits_btv, *sums = in_parts(outputs)
        # A head may unembed chosen positions, [n, v]; the model's own code expects rows of them.
        rows_btv = logits_btv.reshape(-1, *logits_btv.shape[-2:])
        return joined(self.blueprint.skeleton.logits(rows_btv).reshape_as(logits_btv), *sums)
