"""The micro-batches that the first stage reads."""

from dataclasses import dataclass, field
from itertools import islice
from numbers import Number
from typing import Any

import torch
from deepspeed.runtime.dataloader import DeepSpeedDataLoader, RepeatingLoader
from deepspeed.utils import logger
from torch import Tensor

from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.errors import DataError
from ds_interlock.transport.host import to_device
from ds_interlock.transport.ranks import StageRanks


@dataclass
class TrainingData:
    """Reads DeepSpeed's data iterator, and knows how far it has got."""

    engine: DeepSpeedSide
    ranks: StageRanks
    consumed: int = 0
    """Micro-batches read for training since the run began, also before it was resumed."""
    _put_back: list[Any] = field(default_factory=list)

    def load(self, micro_batch: int) -> tuple[Any, Any]:
        """Inputs and labels of the next micro-batch, on this rank's device; a number becomes a tensor."""
        pair = self._put_back.pop() if self._put_back else self.read(micro_batch)
        if not isinstance(pair, tuple | list) or len(pair) < 2:
            raise DataError(
                f"the data iterator gave {type(pair).__name__} where a pair (inputs, labels) was expected"
            )
        inputs, labels, *_ = pair  # DeepSpeed reads no more
        if isinstance(labels, Number):
            labels = torch.tensor(labels, dtype=torch.float64 if isinstance(labels, float) else None)
        return _to_device(inputs, self.ranks.device), _to_device(labels, self.ranks.device)

    def read(self, micro_batch: int = 0) -> Any:
        """What the iterator gives next, for this micro-batch of a batch."""
        engine, pair = self.engine, None
        if engine.data_iterator is None and engine.batch_fn is None:
            raise DataError("stage 0 has no data: pass data_iter, or training_data to initialize")
        try:
            if engine.data_iterator is not None:  # batch_fn may get it from another tensor-parallel rank
                pair = next(engine.data_iterator)
        except StopIteration:
            where = "in the middle of" if micro_batch else "before"
            raise DataError(
                f"the data iterator ended {where} a batch, which takes {engine.micro_batches} micro-batches "
                "(gradient_accumulation_steps): use deepspeed.utils.RepeatingLoader, or stop before"
            ) from None
        self.consumed += 1 if engine.module.training else 0
        return engine.batch_fn(pair) if engine.batch_fn else pair

    def put_back(self, pair: Any) -> None:
        """Makes ``pair`` what ``load`` returns next, on the first stage."""
        self._put_back = [pair]

    def state(self) -> dict[str, Any]:
        """How far it has got; of an iterator that can be resumed from one, its state."""
        iterator: Any = self.engine.data_iterator if self.ranks.is_first_stage else None
        return {
            "consumed_micro_batches": self.consumed,
            "samples_per_micro_batch": self._micro_batch_of_all_replicas,
            "data_iterator": iterator.state_dict() if hasattr(iterator, "state_dict") else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues in the data where the saved run was, though its micro-batches had another size."""
        now = self._micro_batch_of_all_replicas
        self.consumed = state["consumed_micro_batches"] * state.get("samples_per_micro_batch", now) // now
        if not self.ranks.is_first_stage:
            self.consumed = 0
            return
        engine = self.engine
        loader = engine.training_dataloader
        if state["data_iterator"] is not None and hasattr(engine.data_iterator, "load_state_dict"):
            engine.data_iterator.load_state_dict(state["data_iterator"])
        elif loader is not None:
            position = (
                _restart(loader, self.consumed) if isinstance(loader, RepeatingLoader) else self.consumed
            )
            engine.set_dataloader(loader)
            for _ in range(position):
                next(engine.data_iterator)
        elif self.consumed:
            has_state = state["data_iterator"] is not None
            logger.warning(
                "the data iterator cannot be put back: "
                + ("call set_dataiterator before load_checkpoint, or " if has_state else "")
                + f"skip {self.consumed} micro-batches on stage 0 (engine.consumed_micro_batches) before the "
                "next train_batch"
            )

    @property
    def _micro_batch_of_all_replicas(self) -> int:
        """Samples in a micro-batch of every replica together."""
        return self.engine.train_micro_batch_size_per_gpu() * self.ranks.num_replicas


def _restart(repeating: RepeatingLoader, position: int) -> int:
    """Lets it begin ``position`` micro-batches later, without reading them; returns how many are left to.

    The order of samples is the same in every epoch, as DeepSpeed makes it.
    """
    loader = repeating.loader
    if isinstance(loader, DeepSpeedDataLoader) and not loader.curriculum_learning_enabled:
        sampler = loader.data_sampler
        loader.data_sampler = islice(sampler, position % len(loader) * loader.batch_size, None)
        repeating.data_iter, position = iter(loader), 0
        loader.data_sampler = sampler  # of later epochs
    else:
        repeating.data_iter = iter(loader)  # iter() of itself continues where it is
    return position


def _to_device(part: Any, device: torch.device) -> Any:
    """A tensor, a tuple of tensors, or None, on ``device``, in memory that the iterator does not keep."""
    if part is None:
        return None
    if isinstance(part, Tensor):
        is_there = part.device.type == device.type
        return part.detach().to(device, copy=True) if is_there else to_device(part.detach(), device)
    if isinstance(part, tuple | list) and all(isinstance(item, Tensor) for item in part):
        return tuple(_to_device(item, device) for item in part)
    raise DataError(f"inputs and labels must be a tensor or a tuple of tensors, got {type(part).__name__}")
