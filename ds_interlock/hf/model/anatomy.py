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

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from ds_interlock.errors import ConfigError, first_line

_BATCH, _POSITIONS = 2, 3
_MOST_RETURNED = 3


class Source(NamedTuple):
    """Where a tensor comes from that a block gets beside its hidden state, and that weights have made."""

    is_front: bool  # made before the first block; else by the block before
    number: int  # which one of the front's; or its place in what the block before returned


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
    stored_bias: str | None  # another name of the unembedding's bias, which files may have
    num_returned: int  # by a block, in a tuple that begins with the hidden state; 0: the hidden state alone
    is_plain: bool  # hidden states between blocks are [b, t, d], not several at each position
    needs_ids: bool  # blocks get the token ids
    beside: tuple[Mapping[int, Source], ...]  # by block: of its other arguments, by their number as leaves

    def travels_into(self, index: int) -> list[Source]:
        """What arrives at block ``index`` beside the hidden state, in order; nothing after the last one."""
        of_front = {source for needs in self.beside[index:] for source in needs.values() if source.is_front}
        own = {source for needs in self.beside[index : index + 1] for source in needs.values()}
        return sorted(of_front | own)

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
    if getattr(config.get_text_config(), "hidden_size", None) is None:
        _cannot_cut(name, "its configuration has no hidden_size, so it has not one width")
    names = {module: path for path, module in model.named_modules()}
    unembedding = names.get(model.get_output_embeddings())
    view = _find_blocks(model, unembedding)
    parts = list(_parts_with_weights(model, view.blocks, unembedding))
    _refuse_other_weights(model, view.blocks, unembedding)
    embedding = names.get(_input_embedding(model))
    if embedding is None:
        _cannot_cut(name, "transformers does not say which module is its token embedding")
    tied = {f"{unembedding}.weight", f"{embedding}.weight"} in map(set, _tied_weights(model).items())
    return Anatomy(
        blocks=view.blocks,
        num_blocks=view.num_calls,
        front=tuple(part for part in parts if part in view.front),
        end=tuple(part for part in parts if part not in view.front and part != unembedding),
        embedding=embedding,
        unembedding=unembedding,
        tied=tied,
        stored_bias=_tied_weights(model).get(f"{unembedding}.bias"),
        num_returned=view.num_returned,
        is_plain=view.is_plain,
        # Their shapes follow from those of the embeddings, which only ids lead to.
        needs_ids=view.needs_ids or any(s.is_front for needs in view.beside for s in needs.values()),
        beside=tuple(view.beside),
    )


def refuse_other_models(config: Any, name: str) -> None:
    """Raises ConfigError for an encoder-decoder and for anything that is no text model."""
    if getattr(config, "is_encoder_decoder", False):
        _cannot_cut(name, "it is an encoder-decoder; decoder-only models and BERT-style encoders can be cut")
    for part in ("vision_config", "audio_config"):
        if getattr(config, part, None) is not None:
            why = f"it is no text model (its configuration has a {part})"
            _cannot_cut(name, f"{why}; --text_model_only takes its text part")


def base_of(model: Any) -> Any:
    """The part of a language model that returns hidden states; any other model as it is."""
    base = model.base_model
    if base is not model or model.get_output_embeddings() is None:
        return base
    # Of some classes (Llama 4) the prefix of the base names a larger model.
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), base)


def _input_embedding(model: Any) -> Any:
    for part in (base_of(model), model):
        with suppress(NotImplementedError):
            return part.get_input_embeddings()
    return None


def _tied_weights(model: Any) -> Mapping[str, str]:
    """By the names of tied parameters, those that they share a tensor with."""
    return getattr(model, "all_tied_weights_keys", None) or {}


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


def returned(hidden: Any, num_returned: int, *beside: object) -> Any:
    """What a block returns, as ``Anatomy.num_returned`` says; ``beside`` may be left out."""
    others = beside or (None,) * (num_returned - 1)
    return (hidden, *others) if num_returned else hidden


def shaped_like(module: nn.Module, inputs: Any, options: Any, hidden_btd: Tensor) -> Tensor:
    """Zeros of the shape of what ``module``, all on the meta device, returns; else of the hidden state's."""
    try:
        with torch.no_grad():
            inputs, options = tree_map(
                lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (inputs, options)
            )
            shape = module(*inputs, **options).shape
    except Exception:  # noqa: BLE001 - the model's own code, which may read values
        shape = hidden_btd.shape
    return hidden_btd.new_zeros(shape)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module that computes shapes alone."""
    memo: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in module.buffers()}
    for tensor in module.parameters():
        memo[id(tensor)] = nn.Parameter(tensor.to("meta"), requires_grad=False)
    return copy.deepcopy(module, memo)


def forward_without_cache(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The output of a transformers model, without keys and values for generation, and without losses."""
    options = {name: False for name in ("use_cache", "output_router_logits") if hasattr(model.config, name)}
    return model(**inputs, **options)


class _NotTheBlocks(Exception):  # noqa: N818 - an answer
    pass


class _NoChain(_NotTheBlocks):  # says least: a block that returns another form is wrongly read
    pass


@dataclass
class _FromBlock:
    """What a stand-in for a block returns beside the hidden state; to pytrees a leaf."""

    index: int
    place: int


class _View:
    """One look at a model's forward, with the members of ``blocks`` as its blocks."""

    def __init__(self, model: Any, blocks: str, unembedding: str | None, num_returned: int) -> None:
        self.blocks, self.num_returned = blocks, num_returned
        self.front: set[str] = set()
        self.num_calls = 0
        self.is_plain, self.needs_ids = True, False
        self.beside: list[dict[int, Source]] = []
        self._made_by_front: list[Tensor] = []
        self._from_front: list[Tensor] = []  # what modules have returned: all that depends on them shows it
        self._from_blocks: list[Tensor] = []
        self._ids_bt = torch.ones((_BATCH, _POSITIONS), dtype=torch.int64)
        parts = _parts_with_weights(model, blocks, unembedding)
        self._parts = {path: on_meta(model.get_submodule(path)) for path in parts}
        self._num_blocks = len(model.get_submodule(blocks))
        width, like = model.config.get_text_config().hidden_size, next(model.parameters())
        shape = (_BATCH, _POSITIONS, width)
        self._hidden_btd = torch.zeros(shape, dtype=like.dtype)
        self._last: Any = None  # what the block before returned

    def part(self, path: str, *inputs: Any, **options: Any) -> Tensor:
        """Called for a module beside the blocks."""
        if self.num_calls == 0:
            self.front.add(path)
        elif self.num_calls < self._num_blocks or path in self.front:
            raise _NotTheBlocks(f"{path} is called between or on both sides of the blocks of {self.blocks}")
        elif self._num_blocks == 1:  # no second block shows what one returned
            self._check_shape(inputs[0] if inputs else None, path)
        if self.num_calls:
            self._check_end(path, [inputs, options])
        shaped = shaped_like(self._parts[path], inputs, options, self._hidden_btd).requires_grad_()
        self._from_front += [shaped] if self.num_calls == 0 else []
        return shaped.clone()  # may be changed in place

    def block(self, index: int, *inputs: Any, **options: Any) -> Any:
        """Called for a block."""
        hidden_btd, others = take_hidden(inputs, options)
        where = f"{self.blocks}.{index}"
        if index != self.num_calls:
            raise _NotTheBlocks(f"{where} is called {index and 'out of order or '}more than once")
        if index and hidden_btd is not self._last:
            raise _NoChain(f"{where} does not get what the block before it returned")
        self._check_shape(hidden_btd, where)
        leaves = tree_leaves([others, options])
        sources = ((number, self._source(leaf, index)) for number, leaf in enumerate(leaves))
        self.beside.append({number: source for number, source in sources if source is not None})
        self.needs_ids |= any(
            isinstance(leaf, Tensor) and leaf.data_ptr() == self._ids_bt.data_ptr() for leaf in leaves
        )
        self.num_calls += 1
        self._from_blocks.append(torch.zeros_like(hidden_btd, requires_grad=True))
        self._last = self._from_blocks[-1].clone()
        others = tuple(_FromBlock(index, place) for place in range(1, self.num_returned))
        return returned(self._last, self.num_returned, *others)

    def _source(self, leaf: Any, index: int) -> Source | None:
        """Where an argument of block ``index`` comes from; None if every stage can compute it."""
        fault = f"{self.blocks}.{index} gets what blocks before the last one have made"
        if isinstance(leaf, _FromBlock):
            if leaf.index != index - 1:
                raise _NotTheBlocks(fault)
            return Source(False, leaf.place)
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return None
        if _depends_on(leaf, self._from_blocks):
            raise _NotTheBlocks(fault)
        same = (number for number, tensor in enumerate(self._made_by_front) if tensor is leaf)
        number = next(same, len(self._made_by_front))
        self._made_by_front[number:] = self._made_by_front[number:] or [leaf]
        return Source(True, number)

    def _check_end(self, where: str, inputs: Any) -> None:
        """After the blocks only what the last one has returned may be read."""
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor) and _depends_on(leaf, self._from_front + self._from_blocks[:-1]):
                raise _NotTheBlocks(f"{where} gets more than what the last block of {self.blocks} returned")

    def _check_shape(self, hidden_btd: Any, where: str) -> None:
        shape = hidden_btd.shape if isinstance(hidden_btd, Tensor) else torch.Size()
        rows, width = self._hidden_btd.shape[:2], self._hidden_btd.shape[2]
        # There may be several, [b, t, n, d] or [b, t, nd].
        if shape[:2] != rows or len(shape) < 3 or shape[-1] % width:
            got = list(hidden_btd.shape) if isinstance(hidden_btd, Tensor) else type(hidden_btd).__name__
            raise _NotTheBlocks(f"{where} takes {got}, no hidden state [batch, position, width]")
        self.is_plain &= shape == self._hidden_btd.shape

    def look(self, model: Any) -> None:
        """Runs the forward; _NotTheBlocks with the reason if these are not the blocks."""
        calls: dict[str, Callable[..., Any]] = {path: partial(self.part, path) for path in self._parts}
        calls |= {f"{self.blocks}.{i}": partial(self.block, i) for i in range(self._num_blocks)}
        with _replaced(model, calls), torch.enable_grad():
            outputs = forward_without_cache(base_of(model), {"input_ids": self._ids_bt})
            self._check_end("its end", outputs[0])
        if self.num_calls != self._num_blocks:
            called = f"{self.num_calls} of the {self._num_blocks} modules"
            raise _NotTheBlocks(f"{called} of {self.blocks} are called")


def _depends_on(tensor: Tensor, sources: list[Tensor]) -> bool:
    if not tensor.requires_grad or not sources:
        return False
    gradients = torch.autograd.grad(tensor.sum(), sources, allow_unused=True, retain_graph=True)
    return any(gradient is not None for gradient in gradients)


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


def _find_blocks(model: Any, unembedding: str | None) -> _View:
    lists = sorted(_lists_with_weights(model), key=lambda path: -_num_numbers(model.get_submodule(path)))
    reasons = []
    for blocks in lists:
        for num_returned in range(_MOST_RETURNED + 1):
            view = _View(model, blocks, unembedding, num_returned)
            try:
                view.look(model)
            except _NotTheBlocks as reason:
                reasons.append(((view.num_calls, not isinstance(reason, _NoChain)), str(reason)))
            except Exception as error:  # noqa: BLE001 - the model's own code, with what it does not expect
                reasons.append(
                    ((0, True), f"its forward stops at stand-ins for {blocks} ({first_line(error)})")
                )
            else:
                return view
    # The list that was followed farthest tells most.
    for blocks in lists[:1]:
        _refuse_other_weights(model, blocks, unembedding)
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


def _parts_with_weights(model: nn.Module, blocks: str, unembedding: str | None) -> Iterator[str]:
    """The largest modules with weights that contain neither blocks nor unembedding, in their order."""
    for name, module in _containers(model, blocks, unembedding):
        for key, child in module.named_children():
            path = f"{name}.{key}".lstrip(".")
            is_container = any(f"{inside}".startswith(f"{path}.") for inside in (blocks, unembedding))
            if path != blocks and not is_container and next(child.parameters(), None) is not None:
                yield path


def _containers(model: nn.Module, blocks: str, unembedding: str | None) -> Iterator[tuple[str, nn.Module]]:
    """The modules that contain blocks or unembedding, the larger ones first."""
    for name, module in model.named_modules():
        if not name or any(f"{inside}".startswith(f"{name}.") for inside in (blocks, unembedding)):
            yield name, module


def _refuse_other_weights(model: nn.Module, blocks: str, unembedding: str | None) -> None:
    """Raises ConfigError for weights that would be of no layer, or of several."""
    tied = _tied_weights(model)
    of_unembedding = {source for target, source in tied.items() if target.startswith(f"{unembedding}.")}
    for name, module in _containers(model, blocks, unembedding):
        names = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
        own = ", ".join(path.rpartition(".")[2] for path in names if path not in of_unembedding)
        if own:
            _cannot_cut(type(model).__name__, f"{name or 'the model'} has weights of its own: {own}")
    if any(all(name.startswith(f"{blocks}.") for name in pair) for pair in tied.items()):
        _cannot_cut(type(model).__name__, f"members of {blocks} share weights")
