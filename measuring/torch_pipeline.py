"""A model under one of torch's own pipeline schedules, to measure beside ours.

Interleaved and zero-bubble schedules put two stages on every rank: the model is then cut into twice as many
stages, of half the work each.

    K = 2   1F1B          rank 0: stage 0       rank 1: stage 1
            interleaved   rank 0: stages 0, 2   rank 1: stages 1, 3
            ZBV           rank 0: stages 0, 3   rank 1: stages 1, 2
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from measuring.engines import LEARNING_RATE, Workload

TORCH_SCHEDULES: dict[str, tuple[Any, Callable[[int, int], list[int]]]] = {
    "torch 1F1B": (pipelining.Schedule1F1B, lambda rank, num: [rank]),
    "torch interleaved 1F1B": (pipelining.ScheduleInterleaved1F1B, lambda rank, num: [rank, rank + num]),
    "torch ZBV": (pipelining.ScheduleZBVZeroBubble, lambda rank, num: [rank, 2 * num - 1 - rank]),
}
"""The class of a schedule, and the stages on a rank: of its number and the number of ranks."""


class TorchPipeline:
    """This rank's part of a model under one of torch's schedules, with SGD."""

    def __init__(self, name: str, work: Workload) -> None:
        torch.manual_seed(0)
        self.work = work
        self.make_schedule, stages_on = TORCH_SCHEDULES[name]
        of_rank = stages_on(dist.get_rank(), dist.get_world_size())
        self.num_stages = len(of_rank) * dist.get_world_size()
        bounds = work.bounds(self.num_stages)
        self.parts = {
            stage: nn.Sequential(*(spec.build() for spec in work.layers[bounds[stage] : bounds[stage + 1]]))
            for stage in of_rank
        }
        parameters = [parameter for part in self.parts.values() for parameter in part.parameters()]
        self.optimizer = torch.optim.SGD(parameters, LEARNING_RATE)

    def set_train_batch_size(self, num_samples: int) -> None:
        """Sets the number of micro-batches; ValueError if torch's schedule refuses it."""
        self.num_micro_batches = num_samples // len(self.work.micro_batch[0])
        stages = [
            pipelining.PipelineStage(part, number, self.num_stages, torch.device("cpu"))
            for number, part in self.parts.items()
        ]
        of_rank = stages if len(stages) > 1 else stages[0]
        self.schedule = self.make_schedule(of_rank, self.num_micro_batches, loss_fn=self.work.loss_fn)

    def train_batch(self, data_iter: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Trains on one batch; every rank reads it."""
        micro_batches = [next(data_iter) for _ in range(self.num_micro_batches)]
        inputs, labels = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
        arguments: dict[str, Any] = {"return_outputs": False}
        if self.num_stages - 1 in self.parts:
            arguments |= {"target": labels, "losses": []}
        self.schedule.step(*([inputs] if 0 in self.parts else []), **arguments)
        self.optimizer.step()
        self.optimizer.zero_grad()
