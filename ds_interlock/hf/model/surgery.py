"""Cuts a Hugging Face model into pipeline layers. The only file that knows architectures.

    model              front                blocks             end            unembedding
    LlamaForCausalLM   model.embed_tokens   model.layers.0 ..  model.norm     lm_head
    GPT2LMHeadModel    wte, wpe             transformer.h.0 .. ln_f           lm_head (tied to wte)
    BertForSequence..  bert.embeddings      encoder.layer.0 .. bert.pooler, classifier

No forward is written again. What happens between those modules (masks, rotary angles, the scale of
embeddings, soft-capping) is left to the model's own forward, run on a ``Skeleton``: the model without
weights, in which a *guest* takes the place of every block and records its arguments.

    front    the forward runs up to the first block, whose first argument is the hidden state
    block    the forward runs past all blocks; the other arguments of this one are recorded, the same for all
             micro-batches of one shape without masks
    end      the last block returns the hidden state of the pipeline; the forward continues from there

Which module is what follows from transformers' own pipeline plans (``config.base_model_pp_plan``); a small
table covers families without one.

Shape suffixes: b batch, t position, d hidden width, v vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ds_interlock.errors import ConfigError


class _Family(NamedTuple):
    """The list of blocks, and the modules before them; names within the base model."""

    blocks: str
    front: tuple[str, ...]
    returns_tuple: bool = False
    """Whether a block returns a tuple that begins with the hidden state, as older models' do."""


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
"""Families without a plan in transformers, by ``config.model_type``."""


@dataclass(frozen=True)
class Anatomy:
    """Which of a model's modules is what, by names within the model.

    Attributes:
        blocks: The list of blocks.
        num_blocks: How many there are.
        front: Modules with weights before the blocks.
        end: Modules with weights after the blocks, the unembedding aside.
        embedding: The token embedding, one of ``front`` or within one.
        unembedding: Maps hidden states to logits; None in a model without one.
        tied: Whether the unembedding's weight is the token embedding's.
        returns_tuple: Whether a block returns a tuple that begins with the hidden state.
    """

    blocks: str
    num_blocks: int
    front: tuple[str, ...]
    end: tuple[str, ...]
    embedding: str
    unembedding: str | None
    tied: bool
    returns_tuple: bool


def find_anatomy(model: Any) -> Anatomy:
    """The anatomy of a transformers model, which may be on the meta device.

    Raises:
        ConfigError: If it has a form that cannot be cut.
    """
    config, name = model.config, type(model).__name__
    refuse_other_models(config, name)
    base = "" if model.base_model is model else model.base_model_prefix
    family = _family_of(config, name)
    blocks, *front = (f"{base}.{path}".lstrip(".") for path in (family.blocks, *family.front))
    modules = dict(model.named_modules())
    if not isinstance(modules.get(blocks), nn.ModuleList):
        _cannot_cut(name, f"expected its blocks in {blocks}")
    unembedding = _name_of(model, model.get_output_embeddings())
    parts = list(_parts_with_weights(model, blocks))
    embedding = _name_of(model, model.base_model.get_input_embeddings())
    assert embedding is not None, "every text model has an embedding"
    tied = unembedding is not None and bool(config.tie_word_embeddings)
    if tied and model.get_output_embeddings().bias is not None:
        _cannot_cut(name, f"{unembedding} has a bias beside its tied weight")
    return Anatomy(
        blocks=blocks,
        num_blocks=len(modules[blocks]),
        front=tuple(part for part in parts if part in front),
        end=tuple(part for part in parts if part not in front and part != unembedding),
        embedding=embedding,
        unembedding=unembedding,
        tied=tied,
        returns_tuple=family.returns_tuple,
    )


def refuse_other_models(config: Any, name: str) -> None:
    """Raises ConfigError for an encoder-decoder and for anything that is no text model."""
    if getattr(config, "is_encoder_decoder", False):
        _cannot_cut(name, "it is an encoder-decoder; decoder-only models and BERT-style encoders can be cut")
    other = [part for part in ("vision_config", "audio_config") if getattr(config, part, None) is not None]
    if other:
        _cannot_cut(name, f"it is no text model (its configuration has a {other[0]}); take its text model")


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
            f'transformers has no pipeline plan for model_type "{config.model_type}", and the table in '
            f"ds_interlock/hf/model/surgery.py has none either (it has {', '.join(sorted(_WITHOUT_PLAN))})",
        )
    return _WITHOUT_PLAN[config.model_type]


def _cannot_cut(name: str, why: str) -> NoReturn:
    raise ConfigError(f"--model: {name} cannot be cut into pipeline layers: {why}")


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _parts_with_weights(model: nn.Module, blocks: str) -> Iterator[str]:
    """The largest modules with weights that do not contain the blocks, in the order of their definition."""
    pending = [("", model)]
    while pending:
        name, module = pending.pop(0)
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own:
            _cannot_cut(
                type(model).__name__, f"{name or 'the model'} has weights of its own: {', '.join(own)}"
            )
        for key, child in module.named_children():
            path = f"{name}.{key}".lstrip(".")
            if blocks.startswith(f"{path}."):
                pending.append((path, child))
            elif path != blocks and next(child.parameters(), None) is not None:
                yield path


def forward_without_cache(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The output of a transformers model that keeps no keys and values for generation."""
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return model(**inputs, **options)


class _Captured(Exception):  # noqa: N818 - not an error: ends a forward early, with its result so far
    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden


class _StandIn(nn.Module):
    """Replaces a module whose weights are on another layer; its attributes are that module's."""

    def __init__(self, module: nn.Module, result: Callable[[], Any]) -> None:
        super().__init__()
        self.__dict__["_instead_of"] = module  # not registered: its weights are not this model's
        self.result = result

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.result()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_instead_of"], name)


Visit = Callable[[int, Any, tuple[Any, ...], dict[str, Any]], Any]


class _Guest(_StandIn):
    """Replaces a block: passes its arguments to the skeleton."""

    def __init__(self, block: nn.Module, index: int, visit: Visit, returns_tuple: bool) -> None:
        super().__init__(block, lambda: None)
        self.index = index
        self.visit = visit
        self.returns_tuple = returns_tuple

    def forward(self, *inputs: Any, **options: Any) -> Any:
        hidden, rest = (inputs[0], inputs[1:]) if inputs else (options.pop("hidden_states"), ())
        hidden = self.visit(self.index, hidden, rest, options)
        return (hidden,) if self.returns_tuple else hidden


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Skeleton:
    """A model's own forward, without its weights.

    Args:
        model: A transformers model whose parameters are on the meta device, and whose buffers are not. It is
            taken apart: afterwards use ``anatomy`` and ``original``.
    """

    def __init__(self, model: Any) -> None:
        self.anatomy = find_anatomy(model)
        self.model = model
        self._originals: dict[str, nn.Module] = {}
        self._hidden: Any = None
        self._visit: Visit = lambda *_: None
        self._arguments: tuple[Sequence[Any], dict[int, Arguments]] | None = None
        self._device = torch.device("cpu")
        self._take_apart()

    def _take_apart(self) -> None:
        anatomy = self.anatomy
        unembedding = () if anatomy.unembedding is None else (anatomy.unembedding,)
        for path in (*anatomy.front, *anatomy.end, *unembedding):
            self._originals[path] = self.model.get_submodule(path)
            self._put(path, _StandIn(self._originals[path], lambda: self._hidden))
        blocks = self.model.get_submodule(anatomy.blocks)
        for index, block in enumerate(blocks):
            self._originals[f"{anatomy.blocks}.{index}"] = block
            blocks[index] = _Guest(block, index, lambda *visit: self._visit(*visit), anatomy.returns_tuple)

    def _put(self, path: str, module: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        self.model.get_submodule(owner)._modules[name] = module

    def __deepcopy__(self, memo: object) -> "Skeleton":
        return self  # layers that are copied share it; it has no weights

    def original(self, path: str) -> nn.Module:
        """A module taken out of the model, without weights: a part, a block, or a module within one."""
        part = next(part for part in self._originals if f"{path}.".startswith(f"{part}."))
        return self._originals[part].get_submodule(path[len(part) + 1 :])

    def front(self, parts: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> Tensor:
        """The hidden state that the forward passes to the first block, hidden_btd.

        Args:
            parts: The modules before the blocks, by name, with their weights.
            inputs: ``input_ids`` and other arguments of the model, ``[b, t]`` each.
        """

        def stop(index: int, hidden: Any, *_: Any) -> NoReturn:
            raise _Captured(hidden)

        training = any(part.training for part in parts.values())
        hidden = self._run(self.model.base_model, inputs, stop, parts, training)
        assert isinstance(hidden, Tensor)
        return hidden

    def arguments(self, index: int, hidden_btd: Tensor, context: Mapping[str, Tensor]) -> Arguments:
        """The arguments of block ``index`` besides the hidden state, positional and by name.

        Args:
            index: Of the block.
            hidden_btd: Has the batch's shape, dtype and device.
            context: ``attention_mask`` and ``position_ids``, ``[b, t]``, if the data has them.
        """
        key = (*context.values(), hidden_btd.shape, hidden_btd.dtype, hidden_btd.device)
        if self._arguments is None or not _same(self._arguments[0], key):
            self._arguments = key, self._arguments_of_all(hidden_btd, context)
        return self._arguments[1][index]

    def _arguments_of_all(self, hidden_btd: Tensor, context: Mapping[str, Tensor]) -> dict[int, Arguments]:
        arguments: dict[int, Arguments] = {}

        def note(index: int, hidden: Any, rest: tuple[Any, ...], options: dict[str, Any]) -> Any:
            arguments[index] = rest, options
            if len(arguments) == self.anatomy.num_blocks:
                raise _Captured(None)
            return hidden

        with torch.no_grad():
            self._hidden = hidden_btd.detach()
            inputs = {"inputs_embeds": self._hidden, **context}
            self._run(self.model.base_model, inputs, note, {}, training=False)
        return arguments

    def end(
        self,
        parts: Mapping[str, nn.Module],
        hidden_btd: Tensor,
        context: Mapping[str, Tensor],
        training: bool,
    ) -> Tensor:
        """The input of the unembedding ``[b, t, d]``; in a model without one, its logits.

        Args:
            parts: The modules after the blocks, by name, with their weights.
            hidden_btd: The last block's output.
            context: As for ``arguments``.
            training: Whether dropout without weights is on.
        """
        self._hidden = hidden_btd
        inputs = {"inputs_embeds": hidden_btd, **context}
        is_language_model = self.anatomy.unembedding is not None
        model = self.model.base_model if is_language_model else self.model
        outputs = self._run(model, inputs, lambda *_: hidden_btd, parts, training)
        result = outputs.last_hidden_state if is_language_model else outputs.logits
        assert isinstance(result, Tensor)
        return result

    def logits(self, unembedded_btv: Tensor) -> Tensor:
        """The model's logits, scaled or soft-capped, from its unembedding's output."""
        assert self.anatomy.unembedding is not None
        self._hidden = unembedded_btv.new_zeros(()).expand(*unembedded_btv.shape[:-1], 1)
        unembedding = _StandIn(self._originals[self.anatomy.unembedding], lambda: unembedded_btv)
        parts = {self.anatomy.unembedding: unembedding}
        outputs = self._run(
            self.model, {"inputs_embeds": self._hidden}, lambda *_: self._hidden, parts, False
        )
        result = outputs.logits
        assert isinstance(result, Tensor)
        return result

    def changes_logits(self) -> bool:
        """Whether ``logits`` changes its argument."""
        assert self.anatomy.unembedding is not None
        probe_btv = torch.linspace(-50, 50, 8).reshape(1, 2, 4)
        return not torch.equal(self.logits(probe_btv), probe_btv)

    def _run(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        visit: Visit,
        parts: Mapping[str, nn.Module],
        training: bool,
    ) -> Any:
        self._follow(next(iter(inputs.values())).device, training)
        self._visit = visit
        with self._with_parts(parts):
            try:
                return forward_without_cache(model, inputs)
            except _Captured as captured:
                return captured.hidden

    @contextmanager
    def _with_parts(self, parts: Mapping[str, nn.Module]) -> Iterator[None]:
        stand_ins = {path: self.model.get_submodule(path) for path in parts}
        for path, part in parts.items():
            self._put(path, part)
        try:
            yield
        finally:
            for path, stand_in in stand_ins.items():
                self._put(path, stand_in)

    def _follow(self, device: torch.device, training: bool) -> None:
        """Moves buffers, such as rotary frequencies, to the data's device."""
        if device != self._device:
            self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
            self._device = device
        if training != self.model.training:
            self.model.train(training)


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """The same tensors, not equal ones; equal shapes."""
    return len(one) == len(other) and all(
        a is b if isinstance(a, Tensor) else not isinstance(b, Tensor) and a == b
        for a, b in zip(one, other, strict=True)
    )
