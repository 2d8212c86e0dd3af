"""Runs pieces of a Hugging Face model's own forward, for pipeline layers that have the weights.

No forward is written again: what happens between a model's modules (masks, rotary angles, soft-capping) is
left to the model's own, run on a ``Skeleton``, in which a *guest* takes the place of every block.

    front    the forward runs up to the first block, whose first argument is the hidden state
    block    the forward runs past all blocks; the other arguments of this one are recorded, the same for all
             micro-batches of one shape without masks
    end      the last block returns the hidden state of the pipeline; the forward continues from there

Shape suffixes: b batch, t position, d hidden width, v vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ds_interlock.hf.model.anatomy import StandIn, find_anatomy, forward_without_cache, take_hidden


class _Captured(Exception):  # noqa: N818 - not an error: ends a forward early, with its result so far
    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden


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
        self.model.set_submodule(path, StandIn(self._originals[path], call))

    def _call_block(self, index: int, *inputs: Any, **options: Any) -> Any:
        hidden, others = take_hidden(inputs, options)
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
        width = self.model.config.get_text_config().hidden_size  # a norm without weights insists on it
        self._hidden = unembedded_btv.new_zeros(()).expand(*unembedded_btv.shape[:-1], width)
        original = self._originals[self.anatomy.unembedding]
        parts = {self.anatomy.unembedding: StandIn(original, lambda *_: unembedded_btv)}
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
