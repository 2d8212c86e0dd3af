"""What the stages of a run have written into its checkpoint, read by whoever resumes it.

interlock_stage_00.pt ...   heads        {"0.weight": ...} of this stage; the number is a head's position
                            heads_aside  {layers before it: state} of heads that the run did not use
                            copies       {"in_use": ..., "next": ...} what shared readouts read with
                            tied_modules {"embedding.weight": ...} copies that the stage trains itself
                            plan, schedule, topology
"""

import pickle
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ds_interlock.errors import ConfigError

State = dict[str, Any]

_SAFE: list[Any] = [
    *(fragment_address, np.ndarray, np.dtype, type(np.dtype(np.uint32))),
    *(value.__reduce__()[0] for value in (np.zeros(1), np.float64(0))),
]
"""What our files hold beside tensors and plain values: where DeepSpeed's bf16 optimizer has its parameters,
and numpy's random state."""


def read_file(path: Path) -> State:
    """One of our files, without running code of it; ConfigError if it is missing or has other objects."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: this is no complete checkpoint of as many ranks as now")
    try:
        with torch.serialization.safe_globals(_SAFE):
            state: State = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} holds objects, such as a state_dict() of the data iterator may return, that torch loads "
            "only if they are declared safe: keep plain values there, or call "
            f"torch.serialization.add_safe_globals first: {error}"
        ) from error
    return state


class SavedStages:
    """The files of all stages of the checkpoint in ``folder``."""

    def __init__(self, folder: Path) -> None:
        # By length first: 100 comes after 99.
        files = sorted(folder.glob("interlock_stage_*.pt"), key=lambda file: (len(file.name), file.name))
        self.states = [read_file(file) for file in files]
        self.stage_bounds: list[int] = self.states[0]["plan"]["stage_bounds"]

    def owner(self, layer: int) -> int:
        """The stage that had this layer."""
        return bisect_right(self.stage_bounds, layer) - 1

    def position(self, number: str) -> int:
        """The number of layers before the head with this number."""
        return int(self.states[0]["head_places"][int(number)][1])

    @cached_property
    def heads(self) -> dict[int, State]:
        """The heads in use, by the number of layers before them."""
        heads: dict[int, State] = {}
        for state in self.states:
            for name, tensor in state["heads"].items():
                number, _, rest = name.partition(".")
                heads.setdefault(self.position(number), {})[rest] = tensor
        return heads

    @cached_property
    def heads_aside(self) -> dict[int, State]:
        """Heads that the run kept for later, by the number of layers before them."""
        return {after: head for state in self.states for after, head in state.get("heads_aside", {}).items()}

    @property
    def copies(self) -> State | None:
        """The copies of the unembedding that heads read with, the same on all stages; None without any."""
        return next((state["copies"] for state in self.states if state.get("copies")), None)

    def tied_module(self, key: str, stage: int) -> State:
        """A stage's own copy of a tied module; empty if it had none."""
        copies: Mapping[str, Tensor] = self.states[stage]["tied_modules"]
        return {n.removeprefix(f"{key}."): t for n, t in copies.items() if n.startswith(f"{key}.")}


def fits(state: State, like: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names and shapes."""
    shapes = {name: tensor.shape for name, tensor in like.items()}
    return {name: tensor.shape for name, tensor in state.items()} == shapes
