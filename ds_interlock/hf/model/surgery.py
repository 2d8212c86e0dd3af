"""Cuts a Hugging Face model into pipeline layers. The only file that knows architectures.

    model              front                blocks             end            unembedding
    LlamaForCausalLM   model.embed_tokens   model.layers.0 ..  model.norm     lm_head
    GPT2LMHeadModel    wte, wpe             transformer.h.0 .. ln_f           lm_head (tied to wte)
    BertForSequence..  bert.embeddings      encoder.layer.0 .. bert.pooler, classifier

No forward is written again: what happens between those modules (masks, rotary angles, soft-capping) is left
to the model's own, run on a ``Skeleton``, in which a *guest* takes the place of every block.

    front    the forward runs up to the first block, whose first argument is the hidden state
    block    the forward runs past all blocks; the other arguments of this one are recorded, the same for all
             micro-batches of one shape without masks
    end      the last block returns the hidden state of the pipeline; the forward continues from there

Shape suffixes: b batch, t position, d hidden width, v vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from ds_interlock.errors import ConfigError


class _Family(NamedTuple):
    """The list of blocks, and the modules before them; names within the base model."""

    blocks: str
    front: tuple[str, ...]
    returns_tuple: bool = False  # a block returns a tuple that begins with the hidden state


# Families without a pipeline plan in transformers (``config.base_model_pp_plan``), by ``config.model_type``.
_WITHOUT_PLAN = {
    "bert": _Family("encoder.layer", ("embeddings",)),
    "bloom": _Family("h", ("word_embeddings", "word_embeddings_layernorm"), returns_tuple=True),
    "distilbert": _Family("transformer.layer", ("embeddings",)),
    "electra": _Family("encoder.layer", ("embeddings", "embeddings_project")),
    "falcon": _Family("h", ("word_embeddings",), returns_tuple=True),
    "gpt2": _Family("h", ("wte", "wpe")),
    "gptj": _Family("h", ("wte",), returns_tuple=True),
    "modernbert": _Family("layers", ("embeddings",)),
    "opt": _Family(
        "decoder.layers", ("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in")
    ),
    "roberta": _Family("encoder.layer", ("embeddings",)),
    "stablelm": _Family("layers", ("embed_tokens",)),
    "xlm-roberta": _Family("encoder.layer", ("embeddings",)),
}


@dataclass(frozen=True)
class Anatomy:
    """Which of a model's modules is what, by names within the model."""

    blocks: str  # the list of blocks
    num_blocks: int
    front: tuple[str, ...]  # modules with weights before the blocks
    end: tuple[str, ...]  # modules with weights after the blocks, the unembedding aside
    embedding: str  # the token embedding, one of ``front`` or within one
    unembedding: str | None  # maps hidden states to logits; None in a model without one
    tied: bool  # the unembedding's weight is the token embedding's
    returns_tuple: bool  # a block returns a tuple that begins with the hidden state

    @property
    def parts(self) -> tuple[str, ...]:
        """All modules with weights but the blocks."""
        return (*self.front, *self.end, *([self.unembedding] if self.unembedding else []))


def find_anatomy(model: Any) -> Anatomy:
    """The anatomy of a transformers model, which may be on the meta device; ConfigError if it has none."""
    config, name = model.config, type(model).__name__
    refuse_other_models(config, name)
    base = "" if model.base_model is model else model.base_model_prefix
    family = _family_of(config, name)
    blocks, *front = (f"{base}.{path}".lstrip(".") for path in (family.blocks, *family.front))
    modules = dict(model.named_modules())
    if not isinstance(modules.get(blocks), nn.ModuleList):
        _cannot_cut(name, f"expected its blocks in {blocks}")
    names = {module: name for name, module in modules.items()}
    unembedding = names.get(model.get_output_embeddings())
    parts = list(_parts_with_weights(model, blocks))
    tied = unembedding is not None and bool(config.tie_word_embeddings)
    if tied and model.get_output_embeddings().bias is not None:
        _cannot_cut(name, f"{unembedding} has a bias beside its tied weight")
    return Anatomy(
        blocks=blocks,
        num_blocks=len(modules[blocks]),
        front=tuple(part for part in parts if part in front),
        end=tuple(part for part in parts if part not in front and part != unembedding),
        embedding=names[model.base_model.get_input_embeddings()],
        unembedding=unembedding,
        tied=tied,
        returns_tuple=family.returns_tuple,
    )


def refuse_other_models(config: Any, name: str) -> None:
    """Raises ConfigError for an encoder-decoder and for anything that is no text model."""
    if getattr(config, "is_encoder_decoder", False):
        _cannot_cut(name, "it is an encoder-decoder; decoder-only models and BERT-style encoders can be cut")
    for part in ("vision_config", "audio_config"):
        if getattr(config, part, None) is not None:
            _cannot_cut(name, f"it is no text model (its configuration has a {part}); take its text model")


def _family_of(config: Any, name: str) -> _Family:
    plan = getattr(config, "base_model_pp_plan", None)
    if plan:
        # In order; each name with what it takes and what it returns. The blocks take hidden states first.
        names = list(plan)
        at = next((i for i, key in enumerate(names) if plan[key][0][0] == "hidden_states"), None)
        if at is not None:
            return _Family(names[at], tuple(names[:at]))
    if config.model_type not in _WITHOUT_PLAN:
        _cannot_cut(
            name,
            f'transformers has no pipeline plan for model_type "{config.model_type}", and neither has '
            f"ds_interlock/hf/model/surgery.py (it has {', '.join(sorted(_WITHOUT_PLAN))})",
        )
    return _WITHOUT_PLAN[config.model_type]


def _cannot_cut(name: str, why: str) -> NoReturn:
    raise ConfigError(f"--model: {name} cannot be cut into pipeline layers: {why}")


def _parts_with_weights(model: nn.Module, blocks: str) -> Iterator[str]:
    """The largest modules with weights that do not contain the blocks, in the order of their definition."""
    pending = [("", model)]
    while pending:
        name, module = pending.pop(0)
        own = ", ".join(key for key, _ in module.named_parameters(recurse=False))
        if own:
            _cannot_cut(type(model).__name__, f"{name or 'the model'} has weights of its own: {own}")
        for key, child in module.named_children():
            path = f"{name}.{key}".lstrip(".")
            if blocks.startswith(f"{path}."):
                pending.append((path, child))
            elif path != blocks and next(child.parameters(), None) is not None:
                yield path


def forward_without_cache(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The output of a transformers model, without keys and values for generation."""
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return model(**inputs, **options)


class _Captured(Exception):  # noqa: N818 - not an error: ends a forward early, with its result so far
    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden


class _StandIn(nn.Module):
    """Replaces a module whose weights are on another layer; its attributes are that module's."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["_instead_of"] = module  # not registered: its weights are not this model's
        self.call = call

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.call(*inputs, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_instead_of"], name)


Visit = Callable[[int, Any, tuple[Any, ...], dict[str, Any]], Any]
"""What happens in place of a block: from its index, hidden state and other arguments to its result."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

Inputs = Mapping[str, Tensor]


class Skeleton:
    """A model's own forward, without its weights.

    ``model`` has its parameters on the meta device, and its buffers in memory. It is taken apart: afterwards
    use ``anatomy`` and ``original``.
    """

    def __init__(self, model: Any) -> None:
        self.anatomy, self.model = find_anatomy(model), model
        self._originals: dict[str, nn.Module] = {}
        self._hidden: Any = None
        self._visit: Visit = lambda *_: None
        self._arguments: dict[int, Arguments] = {}
        self._arguments_are_for: Any = None
        self._context: Sequence[Tensor] = ()
        self._device = torch.device("cpu")
        for path in self.anatomy.parts:
            self._replace(path, lambda *_, **__: self._hidden)
        for index in range(self.anatomy.num_blocks):
            self._replace(f"{self.anatomy.blocks}.{index}", partial(self._call_block, index))

    def _replace(self, path: str, call: Callable[..., Any]) -> None:
        self._originals[path] = self.model.get_submodule(path)
        self.model.set_submodule(path, _StandIn(self._originals[path], call))

    def _call_block(self, index: int, *inputs: Any, **options: Any) -> Any:
        hidden, others = (inputs[0], inputs[1:]) if inputs else (options.pop("hidden_states"), ())
        hidden = self._visit(index, hidden, others, options)
        return (hidden,) if self.anatomy.returns_tuple else hidden

    def __deepcopy__(self, memo: object) -> "Skeleton":
        return self  # layers that are copied share it; it has no weights

    def original(self, path: str) -> nn.Module:
        """A module taken out of the model, without weights: a part, a block, or a module within one."""
        part = next(part for part in self._originals if f"{path}.".startswith(f"{part}."))
        return self._originals[part].get_submodule(path[len(part) + 1 :])

    def front(self, parts: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> Tensor:
        """The hidden state for the first block, hidden_btd, from the model's arguments, ``[b, t]`` each.

        ``parts`` are the modules before the blocks, by name, with their weights.
        """

        def stop(index: int, hidden: Any, *_: Any) -> NoReturn:
            raise _Captured(hidden)

        training = any(part.training for part in parts.values())
        return cast(Tensor, self._run(self.model.base_model, inputs, stop, parts, training))

    def arguments(self, index: int, hidden_btd: Tensor, context: Mapping[str, Tensor]) -> Arguments:
        """The arguments of block ``index`` besides the hidden state, positional and by name.

        ``context`` is ``attention_mask`` and ``position_ids``, ``[b, t]``, if the data has them.
        """
        key = (*map(id, context.values()), hidden_btd.shape, hidden_btd.dtype, hidden_btd.device)
        if key != self._arguments_are_for:
            self._arguments = self._arguments_of_all(hidden_btd, context)
            self._arguments_are_for = key
            self._context = tuple(context.values())  # kept, so that no other tensor gets their ids
        return self._arguments[index]

    @torch.no_grad()
    def _arguments_of_all(self, hidden_btd: Tensor, context: Mapping[str, Tensor]) -> dict[int, Arguments]:
        arguments: dict[int, Arguments] = {}

        def note(index: int, hidden: Any, others: tuple[Any, ...], options: dict[str, Any]) -> Any:
            arguments[index] = others, options
            if len(arguments) == self.anatomy.num_blocks:
                raise _Captured(None)
            return hidden

        self._hidden = hidden_btd.detach()
        inputs = {"inputs_embeds": self._hidden, **context}
        self._run(self.model.base_model, inputs, note, {}, training=False)
        return arguments

    def end(
        self, parts: Mapping[str, nn.Module], hidden_btd: Tensor, context: Inputs, training: bool
    ) -> Tensor:
        """The input of the unembedding ``[b, t, d]``; in a model without one, its logits.

        ``parts`` are the modules after the blocks, by name, with their weights; ``hidden_btd`` is the last
        block's output. In ``training``, dropout without weights is on.
        """
        self._hidden = hidden_btd
        is_language_model = self.anatomy.unembedding is not None
        model = self.model.base_model if is_language_model else self.model
        inputs = {"inputs_embeds": hidden_btd, **context}
        outputs = self._run(model, inputs, lambda *_: hidden_btd, parts, training)
        return cast(Tensor, outputs.last_hidden_state if is_language_model else outputs.logits)

    def logits(self, unembedded_btv: Tensor) -> Tensor:
        """The model's logits, scaled or soft-capped, from its unembedding's output."""
        assert self.anatomy.unembedding is not None
        self._hidden = unembedded_btv.new_zeros(()).expand(*unembedded_btv.shape[:-1], 1)
        original = self._originals[self.anatomy.unembedding]
        parts = {self.anatomy.unembedding: _StandIn(original, lambda *_: unembedded_btv)}
        inputs = {"inputs_embeds": self._hidden}
        outputs = self._run(self.model, inputs, lambda *_: self._hidden, parts, training=False)
        return cast(Tensor, outputs.logits)

    def changes_logits(self) -> bool:
        """Whether ``logits`` changes its argument."""
        probe_btv = torch.linspace(-50, 50, 8).reshape(1, 2, 4)
        return not torch.equal(self.logits(probe_btv), probe_btv)

    def _run(
        self, model: nn.Module, inputs: Inputs, visit: Visit, parts: Mapping[str, nn.Module], training: bool
    ) -> Any:
        self._visit = visit
        device = next(iter(inputs.values())).device
        if device != self._device:  # buffers, such as rotary frequencies, are needed there
            self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
            self._device = device
        if training != self.model.training:
            self.model.train(training)
        stand_ins = {path: self.model.get_submodule(path) for path in parts}
        try:
            for path, part in parts.items():
                self.model.set_submodule(path, part)
            return forward_without_cache(model, inputs)
        except _Captured as captured:
            return captured.hidden
        finally:
            for path, stand_in in stand_ins.items():
                self.model.set_submodule(path, stand_in)
