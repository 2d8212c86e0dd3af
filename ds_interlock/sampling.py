"""What a seed fixes: weights; the order of samples, new in each epoch, resumed from one number."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ds_interlock.errors import DataError

Item = TypeVar("Item")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from ``seed`` in its body, and puts torch's random state back to what it was.

    That is the state of the CPU and of this process's GPU, if it uses one. The GPUs of others are left alone.
    """
    uses_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if uses_gpu else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all GPUs
        if uses_gpu:
            torch.cuda.manual_seed(seed)
        yield


def epoch_order(num_items: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``num_items`` indices (int64); no two pairs of seed and epoch share one."""
    generator = torch.Generator().manual_seed(seed * 2**20 + epoch)
    return torch.randperm(num_items, generator=generator)


def set_aside(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """The items of the indices that ``split_indices`` draws."""
    others, aside = split_indices(len(items), share, seed)
    return [items[number] for number in others.tolist()], [items[number] for number in aside.tolist()]


def split_indices(num_items: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """All indices but a random ``share`` (0 to 1) of them, and that share, both ascending (int64).

    It has at least one index, and at most all but one. DataError if there are fewer than two items.
    """
    if num_items < 2:
        raise DataError(
            f"there is only {num_items} document, and validation needs one of its own: give a "
            "--validation_file, or more documents (form feeds or blank lines divide a single text file)"
        )
    num_aside = min(max(round(share * num_items), 1), num_items - 1)
    is_other = torch.ones(num_items, dtype=torch.bool)
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))
    is_other[order[:num_aside]] = False
    return is_other.nonzero().flatten(), (~is_other).nonzero().flatten()


class ResumableIterator(Iterator[Item], ABC):
    """An iterator whose order depends on its settings alone, so that its state is one number.

    The engine saves ``state_dict()`` with a checkpoint and gives it to ``load_state_dict`` on resume.
    """

    position: int = 0  # items returned so far

    @abstractmethod
    def fingerprint(self) -> dict[str, int | str]:
        """What the position is a position in: the same for all replicas, without the name "position"."""

    def state_dict(self) -> dict[str, int | str]:
        """The position and the fingerprint; the same for all replicas."""
        return {"position": self.position, **self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continues where ``state`` was taken, in items if sizes differ, rounded down to a micro-batch.

        Raises:
            DataError: If it is of other data, or other settings.
        """
        own = self.fingerprint()
        differing = [
            f"{name} was {state.get(name)} and is {value}"
            for name, value in own.items()
            if name not in _SIZES and state.get(name) != value
        ]
        if differing:
            raise DataError(f"the saved data position does not fit this run: {', '.join(differing)}")
        self.position = int(state["position"]) * _num_items(state) // _num_items(own)


_SIZES = ("micro_batch_size", "num_replicas", "num_micro_batches")


def _num_items(sizes: Mapping[str, int | str]) -> int:
    """In a micro-batch of all replicas."""
    return int(sizes.get("micro_batch_size", 1)) * int(sizes.get("num_replicas", 1))


@dataclass(eq=False)
class EpochIterator(ResumableIterator[Item]):
    """Endless micro-batches of independent items for one data-parallel replica.

    In every epoch all replicas go through the same permutation of the items, each taking its own share. The
    few items that do not fill a micro-batch for every replica are left out, others in each epoch.
    """

    num_items: int  # at least micro_batch_size * num_replicas
    micro_batch_size: int
    replica: int = field(default=0, kw_only=True)  # index of this data-parallel replica
    num_replicas: int = field(default=1, kw_only=True)
    seed: int = field(default=0, kw_only=True)  # decides the order
    shuffle: bool = field(default=True, kw_only=True)  # False keeps the items' own order
    _epoch: int = field(default=-1, init=False)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that this replica gets in an epoch."""
        return self.num_items // (self.micro_batch_size * self.num_replicas)

    def next_indices(self) -> Tensor:
        """Item indices of the next micro-batch (int64); advances the position."""
        epoch, number = divmod(self.position, self.num_micro_batches)
        if epoch != self._epoch:
            self._begin_epoch(epoch)
        start = (number * self.num_replicas + self.replica) * self.micro_batch_size
        self.position += 1
        return self._order[start : start + self.micro_batch_size]

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        items = torch.arange(self.num_items)
        self._order = epoch_order(self.num_items, self.seed, epoch) if self.shuffle else items

    def fingerprint(self) -> dict[str, int | str]:
        sizes = {"micro_batch_size": self.micro_batch_size, "num_replicas": self.num_replicas}
        return {**sizes, "seed": self.seed}
