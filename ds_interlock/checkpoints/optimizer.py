"""The state of an optimizer by the names of parameters: taken from a checkpoint, and put into an optimizer.

    torch's form        {number: state}, groups of numbers                       float32 without ZeRO
    flat copies         a part of each group for every replica, table of names   bf16, ZeRO

By name, a parameter's state fits any number of stages and replicas, and other parameters may be new.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor, nn

State = dict[str, Any]

_FP32 = "fp32"
"""Beside the keys of the optimizer's state: the value of a parameter in its precision."""


class MismatchError(Exception):
    """Why the state of the optimizer does not fit."""


@dataclass
class SavedParameter:
    """What a checkpoint has of one parameter: tensors like it, in pieces if flat, and plain numbers."""

    tensors: dict[str, list[Tensor]]
    numbers: State
    group: tuple[int, int]
    """The saved stage, and the number of the group of its optimizer."""
    options: State
    """Of that group."""

    def whole(self, key: str) -> Tensor:
        """A tensor, whose pieces the replicas had."""
        pieces = self.tensors[key]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


Saved = Mapping[str, SavedParameter]
Groups = dict[int, tuple[int, int]]
"""For the number of each group of an optimizer that has layers: the group that its options are from."""


def from_torch(state: State | None, names: Sequence[Sequence[str]], stage: int) -> Saved:
    """By name from torch's form.

    Args:
        state: The state dict; None if there is none.
        names: Of the parameters in each of its groups.
        stage: The saved stage.
    """
    if not state:
        raise MismatchError("there is none")
    if BASE_OPTIMIZER_STATE in state:
        raise MismatchError("it was saved in bf16 or with ZeRO, this job is in float32 without ZeRO")
    saved = {}
    for number, (group, of_group) in enumerate(zip(state["param_groups"], names, strict=True)):
        for name, index in zip(of_group, group["params"], strict=True):
            of_it = state["state"].get(index, {})
            tensors = {k: [v] for k, v in of_it.items() if isinstance(v, Tensor) and v.dim()}
            numbers = {k: v for k, v in of_it.items() if k not in tensors}
            saved[name] = SavedParameter(tensors, numbers, (stage, number), group)
    return saved


def from_flat(parts: Sequence[State], stage: int) -> Saved:
    """By name from flat copies, put together from the parts of a stage's replicas."""
    saved: dict[str, SavedParameter] = {}
    for part in parts:
        base = part.get(BASE_OPTIMIZER_STATE)
        if not isinstance(base, dict) or PARAM_SLICE_MAPPINGS not in part:
            raise MismatchError("it has no names, as with zero_optimization.elastic_checkpoint")
        for number, names in enumerate(part[PARAM_SLICE_MAPPINGS]):
            group = base["param_groups"][number]
            state = base["state"].get(group["params"][0], {})
            flat = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() == 1}
            flat[_FP32] = part[SINGLE_PARTITION_OF_FP32_GROUPS][number].detach()
            for name, at in names.items():
                numbers = {key: value for key, value in state.items() if key not in flat}
                of_it = saved.setdefault(name, SavedParameter({}, numbers, (stage, number), group))
                for key, tensor in flat.items():
                    of_it.tensors.setdefault(key, []).append(tensor.narrow(0, at.start, at.numel))
    return saved


def to_torch(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], layers: Container[str], saved: Saved
) -> tuple[State, Groups]:
    """A state dict for torch's ``optimizer``. Groups with ``layers`` get the options that these had.

    Raises:
        MismatchError: If shapes or groups do not fit.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    state: dict[int, State] = {}
    listed, groups, number = [], _Groups(layers), 0
    for index, group in enumerate(optimizer.param_groups):
        numbers = range(number, number + len(group["params"]))
        for number, parameter in zip(numbers, group["params"], strict=True):
            name = names.get(id(parameter), "")
            of_it = saved.get(name)
            if of_it is None:
                continue
            groups.add(index, name, of_it)
            tensors = {key: of_it.whole(key) for key in of_it.tensors}
            if tensors and parameter.shape not in [tensor.shape for tensor in tensors.values()]:
                wrong, expected = list(next(iter(tensors.values())).shape), list(parameter.shape)
                raise MismatchError(f"it is for a parameter of shape {wrong}, not {expected}")
            if tensors or of_it.numbers:
                state[number] = {**tensors, **of_it.numbers}
        listed.append({**group, **groups.options.get(index, {}), "params": list(numbers)})
        number = numbers.stop
    return {"state": state, "param_groups": listed}, groups.sources


def to_flat(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], layers: Container[str], saved: Saved
) -> tuple[State, Groups]:
    """The state of DeepSpeed's ``optimizer`` as it is, with what is in ``saved`` in its place; as above."""
    for name, parameter in parameters.items():
        of_it = saved.get(name)
        if name in layers and (of_it is None or of_it.whole(_FP32).numel() != parameter.numel()):
            raise MismatchError(f"it has no {name} of {parameter.numel()} values")
    own: State = optimizer.state_dict()
    masters = [flat.detach().clone() for flat in own[SINGLE_PARTITION_OF_FP32_GROUPS]]
    states: dict[int, State] = {}
    listed, groups = [], _Groups(layers)
    for number, group in enumerate(optimizer.optimizer.param_groups):
        whole = {_FP32: masters[number]}
        for name, place in own[PARAM_SLICE_MAPPINGS][number].items():
            if name not in saved:
                continue
            groups.add(number, name, saved[name])
            state = states.setdefault(number, dict(saved[name].numbers))
            first = parameters[name]._hp_mapping.lp_fragment_address.start  # type: ignore[attr-defined]
            for key in saved[name].tensors:
                if key not in whole:
                    whole[key] = state[key] = torch.zeros_like(group["params"][0])
                piece = saved[name].whole(key).narrow(0, first, place.numel)
                whole[key].narrow(0, place.start, place.numel).copy_(piece)
        listed.append({**group, **groups.options.get(number, {}), "params": [number]})
    own[BASE_OPTIMIZER_STATE] = {"state": states, "param_groups": listed}
    own[SINGLE_PARTITION_OF_FP32_GROUPS] = masters
    return own, groups.sources


class _Groups:
    """Which saved groups the groups of an optimizer have their options from: those of layers."""

    def __init__(self, layers: Container[str]) -> None:
        self.layers = layers
        self.options: dict[int, State] = {}
        self.sources: Groups = {}
        self._targets: dict[tuple[int, int], int] = {}

    def add(self, number: int, name: str, saved: SavedParameter) -> None:
        """Group ``number`` has ``name``; MismatchError if it belongs elsewhere."""
        if name not in self.layers:
            return
        options = {key: value for key, value in saved.options.items() if key != "params"}
        self.sources.setdefault(number, saved.group)
        if self.options.setdefault(number, options) != options:
            raise MismatchError(f"{name} is in another group of parameters")
        if self._targets.setdefault(saved.group, number) != number:
            raise MismatchError("it has fewer groups of parameters")
