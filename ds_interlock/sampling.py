"""The order in which samples come: fixed by a seed, anew in each epoch, and resumed from one number."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ds_interlock.errors import DataError

Item = TypeVar("Item")


def epoch_order(num_items: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``num_items`` numbers (int64); the epochs of a seed share it with no other seed's."""
    generator = torch.Generator().manual_seed(seed * 2**20 + epoch)
    return torch.randperm(num_items, generator=generator)


def set_aside(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Puts a random ``share`` of the items aside: at least one, at most all but one.

    Args:
        items: Two or more.
        share: Between 0 and 1.
        seed: Decides which.

    Returns:
        The others, and those put aside, both in the order they had.
    """
    assert len(items) > 1
    num_aside = min(max(round(share * len(items)), 1), len(items) - 1)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    aside = set(order[:num_aside])
    return (
        [item for number, item in enumerate(items) if number not in aside],
        [item for number, item in enumerate(items) if number in aside],
    )


class ResumableIterator(Iterator[Item], ABC):
    """An iterator whose order depends on its settings alone, so that its state is one number.

    The engine saves ``state_dict()`` with a checkpoint and gives it to ``load_state_dict`` on resume.

    Attributes:
        position: Items given so far.
    """

    position: int = 0

    @abstractmethod
    def fingerprint(self) -> dict[str, int | str]:
        """What the position is a position in: the same for all replicas, without the name "position"."""

    def state_dict(self) -> dict[str, int | str]:
        """The position, and what it is a position in. The same for all replicas."""
        return {"position": self.position, **self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Goes on where ``state`` was taken.

        Raises:
            DataError: If it was taken from other data, or with other settings.
        """
        differing = [
            f"{name} was {state.get(name)} and is {value}"
            for name, value in self.fingerprint().items()
            if state.get(name) != value
        ]
        if differing:
            raise DataError(
                f"the saved data position does not fit this run: {', '.join(differing)}. Resume with the "
                "data and settings of the saved run"
            )
        self.position = int(state["position"])
