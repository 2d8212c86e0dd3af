"""Runs pieces of a Hugging Face model's own forward, for pipeline layers that have the weights.

No forward is written again: what happens between a model's modules (masks, rotary angles, soft-capping) is
left to the model's own, run on a ``Skeleton``, in which a *guest* takes the place of every block.

    front    the forward runs up to the first block, whose first argument is the hidden state
    block    the forward runs past all blocks; the other arguments of this one are recorded, the same for all
             micro-batches of one shape without masks
    end      the last block returns the hidden state of the pipeline; the forward continues from there

Shape suffixes: b batch, t position, d hidden width, v vocabulary.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ds_interlock.hf.model.anatomy import (
    Source,
    StandIn,
    base_of,
    find_anatomy,
    forward_without_cache,
    on_meta,
    returned,
    shaped_like,
    take_hidden,
)


class _Captured(Exception):  # noqa: N818 - not an error: ends a forward early, with its result so far
    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden


Visit = Callable[[int, Any, tuple[Any, ...], dict[str, Any]], Any]
"""What happens in place of a block: from its index, hidden state and other arguments to its result."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

Inputs = Mapping[str, Tensor]


def _of_front(needs: Mapping[int, Source]) -> dict[int, Source]:
    return {number: source for number, source in needs.items() if source.is_front}


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
        self._context: list[tuple[Tensor, int]] = []  # what they are for, and its version
        self._device = torch.device("cpu")
        for path in self.anatomy.parts:
            self._replace(path, lambda *_, **__: self._hidden)
        if self.anatomy.travels_into(0):
            for path in self.anatomy.front:
                self.model.get_submodule(path).call = partial(self._shaped, on_meta(self._originals[path]))
        for index in range(self.anatomy.num_blocks):
            self._replace(f"{self.anatomy.blocks}.{index}", partial(self._call_block, index))

    def _replace(self, path: str, call: Callable[..., Any]) -> None:
        self._originals[path] = self.model.get_submodule(path)
        self.model.set_submodule(path, StandIn(self._originals[path], call))

    def _shaped(self, part: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        return shaped_like(part, inputs, options, self._hidden)

    def _call_block(self, index: int, *inputs: Any, **options: Any) -> Any:
        hidden, others = take_hidden(inputs, options)
        return returned(self._visit(index, hidden, others, options), self.anatomy.num_returned)

    def __deepcopy__(self, memo: object) -> "Skeleton":
        return self  # layers that are copied share it; it has no weights

    def original(self, path: str) -> nn.Module:
        """A module taken out of the model, without weights: a part, a block, or a module within one."""
        part = next(part for part in self._originals if f"{path}.".startswith(f"{part}."))
        return self._originals[part].get_submodule(path[len(part) + 1 :])

    def front(self, parts: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The hidden state for the first block, hidden_btd, from the model's arguments, ``[b, t]`` each.

        And what travels into the first block beside it. ``parts`` are the modules before the blocks, by name,
        with their weights.
        """
        needs = self.anatomy.beside
        last = max((index for index, own in enumerate(needs) if _of_front(own)), default=0)
        start: list[Any] = []
        beside: dict[Source, Tensor] = {}

        def visit(index: int, hidden: Any, others: tuple[Any, ...], options: dict[str, Any]) -> Any:
            start.append(hidden)
            leaves = tree_leaves([others, options])
            for number, source in _of_front(needs[index]).items():
                beside.setdefault(source, leaves[number])
            if index == last:
                raise _Captured((start[0], *(beside[source] for source in sorted(beside))))
            return hidden

        training = any(part.training for part in parts.values())
        return cast(tuple[Tensor, ...], self._run(base_of(self.model), inputs, visit, parts, training))

    def arguments(self, index: int, hidden_btd: Tensor, context: Mapping[str, Tensor]) -> Arguments:
        """The arguments of block ``index`` besides the hidden state, positional and by name.

        Those in ``Anatomy.beside`` are for the caller to replace.

        ``context`` is ``attention_mask`` and ``position_ids``, ``[b, t]``, if the data has them, and
        ``input_ids``, which count if the blocks need them.
        """
        if not self.anatomy.needs_ids:
            context = {name: tensor for name, tensor in context.items() if name != "input_ids"}
        key = (hidden_btd.shape, hidden_btd.dtype, hidden_btd.device)
        if key != self._arguments_are_for or not self._is_known(context):
            self._arguments = self._arguments_of_all(hidden_btd, context)
            self._arguments_are_for = key
            self._context = [(tensor, tensor._version) for tensor in context.values()]
        return self._arguments[index]

    def _is_known(self, context: Mapping[str, Tensor]) -> bool:
        """Whether the last arguments are for these values: a recomputation of each block brings copies."""
        return len(context) == len(self._context) and all(
            kept._version == version and (kept is tensor or torch.equal(kept, tensor))
            for (kept, version), tensor in zip(self._context, context.values(), strict=True)
        )

    @torch.no_grad()
    def _arguments_of_all(self, hidden_btd: Tensor, context: Mapping[str, Tensor]) -> dict[int, Arguments]:
        arguments: dict[int, Arguments] = {}

        def note(index: int, hidden: Any, others: tuple[Any, ...], options: dict[str, Any]) -> Any:
            arguments[index] = others, options
            if len(arguments) == self.anatomy.num_blocks:
                raise _Captured(None)
            return hidden

        inputs = self._inputs(hidden_btd, context)
        self._run(base_of(self.model), inputs, note, {}, training=False)
        return arguments

    def _inputs(self, hidden: Tensor, context: Mapping[str, Tensor]) -> Inputs:
        """The model's arguments past its front, for a block's hidden state; nothing reads their values."""
        width = self.model.config.get_text_config().hidden_size
        self._hidden = hidden.new_zeros(*hidden.shape[:2], width)
        return context if "input_ids" in context else {"inputs_embeds": self._hidden, **context}

    def end(
        self, parts: Mapping[str, nn.Module], hidden_btd: Tensor, context: Inputs, training: bool
    ) -> Tensor:
        """The input of the unembedding ``[b, t, d]``; in a model without one, its logits.

        ``parts`` are the modules after the blocks, by name, with their weights; ``hidden_btd`` is the last
        block's output. In ``training``, dropout without weights is on.
        """

        def stop(hidden: Tensor) -> NoReturn:
            raise _Captured(hidden)

        inputs = self._inputs(hidden_btd, context)
        unembedding = self.anatomy.unembedding
        if unembedding is None:
            return cast(Tensor, self._run(self.model, inputs, lambda *_: hidden_btd, parts, training).logits)
        parts = {**parts, unembedding: StandIn(self._originals[unembedding], stop)}
        return cast(Tensor, self._run(self.model, inputs, lambda *_: hidden_btd, parts, training))

    def logits(self, unembedded_btv: Tensor) -> Tensor:
        """The model's logits, scaled or soft-capped, from its unembedding's output."""
        assert self.anatomy.unembedding is not None
        ids_bt = torch.zeros(unembedded_btv.shape[:2], dtype=torch.int64, device=unembedded_btv.device)
        inputs = self._inputs(unembedded_btv, {"input_ids": ids_bt} if self.anatomy.needs_ids else {})
        original = self._originals[self.anatomy.unembedding]
        parts = {self.anatomy.unembedding: StandIn(original, lambda *_: unembedded_btv)}
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
