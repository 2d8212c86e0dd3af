"""Finds out which of a transformers model's modules is what, by watching its forward.

    model              front                blocks             end            unembedding
    LlamaForCausalLM   model.embed_tokens   model.layers.0 ..  model.norm     lm_head
    GPT2LMHeadModel    wte, wpe             transformer.h.0 .. ln_f           lm_head (tied to wte)
    BertForSequence..  bert.embeddings      encoder.layer.0 .. bert.pooler, classifier

The blocks are the one list of modules whose members the forward calls one after the other, each with what
the one before it returned. Everything with weights is replaced by a stand-in that notes its call and returns
a hidden state of the right shape, so nothing is computed and no weight is needed. What is called before the
first block is the front; the rest is the end.

Shape suffixes: b batch, t position, d hidden width, v vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ds_interlock.errors import ConfigError, first_line

_BATCH, _POSITIONS = 2, 3


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
    """The anatomy of a transformers model, which may be on the meta device; ConfigError if it has none.

    Its buffers must have values. The model is as before when the function returns.
    """
    config, name = model.config, type(model).__name__
    refuse_other_models(config, name)
    names = {module: path for path, module in model.named_modules()}
    unembedding = names.get(model.get_output_embeddings())
    view = _find_blocks(model)
    parts = list(_parts_with_weights(model, view.blocks))
    if unembedding is not None and unembedding not in parts:
        _cannot_cut(name, f"{unembedding} is a piece of larger output layers")
    tied = unembedding is not None and bool(config.tie_word_embeddings)
    if tied and model.get_output_embeddings().bias is not None:
        _cannot_cut(name, f"{unembedding} has a bias beside its tied weight")
    embedding = names.get(_input_embedding(model))
    if embedding is None:
        _cannot_cut(name, "transformers does not say which module is its token embedding")
    return Anatomy(
        blocks=view.blocks,
        num_blocks=view.num_calls,
        front=tuple(part for part in parts if part in view.front),
        end=tuple(part for part in parts if part not in view.front and part != unembedding),
        embedding=embedding,
        unembedding=unembedding,
        tied=tied,
        returns_tuple=view.returns_tuple,
    )


def refuse_other_models(config: Any, name: str) -> None:
    """Raises ConfigError for an encoder-decoder and for anything that is no text model."""
    if getattr(config, "is_encoder_decoder", False):
        _cannot_cut(name, "it is an encoder-decoder; decoder-only models and BERT-style encoders can be cut")
    for part in ("vision_config", "audio_config"):
        if getattr(config, part, None) is not None:
            why = f"it is no text model (its configuration has a {part})"
            _cannot_cut(name, f"{why}; --text_model_only takes its text part")


def _input_embedding(model: Any) -> Any:
    for part in (model.base_model, model):
        with suppress(NotImplementedError):
            return part.get_input_embeddings()
    return None


def _cannot_cut(name: str, why: str) -> NoReturn:
    raise ConfigError(f"--model: {name} cannot be cut into pipeline layers: {why}")


class StandIn(nn.Module):
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


def take_hidden(inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """A block's hidden state, and its other positional arguments; taken out of ``options`` if it is there."""
    if inputs:
        return inputs[0], inputs[1:]
    floats = (
        key for key, value in options.items() if isinstance(value, Tensor) and value.is_floating_point()
    )
    return options.pop(next(floats, "hidden_states"), None), ()


def forward_without_cache(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The output of a transformers model, without keys and values for generation, and without losses."""
    options = {name: False for name in ("use_cache", "output_router_logits") if hasattr(model.config, name)}
    return model(**inputs, **options)


class _NotTheBlocks(Exception):  # noqa: N818 - an answer
    pass


class _View:
    """One look at a model's forward, with the members of ``blocks`` as its blocks."""

    def __init__(self, model: Any, blocks: str, returns_tuple: bool) -> None:
        self.blocks, self.returns_tuple = blocks, returns_tuple
        self.front: set[str] = set()
        self.num_calls = 0
        self._parts = list(_parts_with_weights(model, blocks))
        self._num_blocks = len(model.get_submodule(blocks))
        width, like = model.config.get_text_config().hidden_size, next(model.parameters())
        shape = (_BATCH, _POSITIONS, width)
        self._hidden_btd = torch.zeros(shape, dtype=like.dtype, requires_grad=True)
        self._last: Any = None  # what the block before returned

    def part(self, path: str, *inputs: Any, **_: Any) -> Tensor:
        """Called for a module beside the blocks."""
        if self.num_calls == 0:
            self.front.add(path)
        elif self.num_calls < self._num_blocks or path in self.front:
            raise _NotTheBlocks(f"{path} is called between or on both sides of the blocks of {self.blocks}")
        elif self._num_blocks == 1:  # no second block shows what one returned
            self._check_shape(inputs[0] if inputs else None, path)
        return self._hidden_btd.clone()

    def block(self, index: int, *inputs: Any, **options: Any) -> Any:
        """Called for a block."""
        hidden_btd, others = take_hidden(inputs, options)
        where = f"{self.blocks}.{index}"
        if index != self.num_calls:
            raise _NotTheBlocks(f"{where} is called {index and 'out of order or '}more than once")
        if index and hidden_btd is not self._last:
            raise _NotTheBlocks(f"{where} does not get what the block before it returned")
        self._check_shape(hidden_btd, where)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves([others, options])):
            raise _NotTheBlocks(f"{where} gets more that is computed from weights than a hidden state")
        self.num_calls += 1
        self._last = hidden_btd.clone()
        return (self._last,) if self.returns_tuple else self._last

    def _check_shape(self, hidden_btd: Any, where: str) -> None:
        if not isinstance(hidden_btd, Tensor) or hidden_btd.shape != self._hidden_btd.shape:
            got = list(hidden_btd.shape) if isinstance(hidden_btd, Tensor) else type(hidden_btd).__name__
            raise _NotTheBlocks(f"{where} takes {got}, no hidden state [batch, position, width]")

    def look(self, model: Any) -> None:
        """Runs the forward; _NotTheBlocks with the reason if these are not the blocks."""
        calls: dict[str, Callable[..., Any]] = {path: partial(self.part, path) for path in self._parts}
        calls |= {f"{self.blocks}.{i}": partial(self.block, i) for i in range(self._num_blocks)}
        ids_bt = torch.ones((_BATCH, _POSITIONS), dtype=torch.int64)
        with _replaced(model, calls):
            forward_without_cache(model.base_model, {"input_ids": ids_bt})
        if self.num_calls != self._num_blocks:
            called = f"{self.num_calls} of the {self._num_blocks} modules"
            raise _NotTheBlocks(f"{called} of {self.blocks} are called")


@contextmanager
def _replaced(model: nn.Module, calls: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    originals = {path: model.get_submodule(path) for path in calls}
    try:
        for path, call in calls.items():
            model.set_submodule(path, StandIn(originals[path], call))
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)


def _find_blocks(model: Any) -> _View:
    lists = sorted(_lists_with_weights(model), key=lambda path: -_num_numbers(model.get_submodule(path)))
    reasons = []
    for blocks in lists:
        for returns_tuple in (False, True):
            view = _View(model, blocks, returns_tuple)
            try:
                view.look(model)
            except _NotTheBlocks as reason:
                reasons.append((view.num_calls, str(reason)))
            except Exception as error:  # noqa: BLE001 - the model's own code, with what it does not expect
                reasons.append((0, f"its forward stops at stand-ins for {blocks} ({first_line(error)})"))
            else:
                return view
    # The list that was followed farthest tells most.
    why = max(reasons, key=lambda reason: reason[0])[1] if reasons else "it has none"
    _cannot_cut(type(model).__name__, f"no list of modules is called one after the other: {why}")


def _num_numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _lists_with_weights(model: nn.Module, name: str = "") -> Iterator[str]:
    """The module lists that are not within another one."""
    for key, child in model.named_children():
        path = f"{name}.{key}".lstrip(".")
        if not isinstance(child, nn.ModuleList):
            yield from _lists_with_weights(child, path)
        elif next(child.parameters(), None) is not None:
            yield path


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
