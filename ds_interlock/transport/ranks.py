"""Which stage and replica this process is, and the collectives between the ranks of a job."""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class StageRanks:
    """This rank among the others, by ``grid``, DeepSpeed's process groups of the pipeline."""

    def __init__(self, grid: Any, device: torch.device) -> None:
        self.device = device
        self.global_rank: int = grid.get_global_rank()
        self.stage: int = grid.get_stage_id()
        self.num_stages: int = grid.pipe_parallel_size
        self.replica: int = grid.get_data_parallel_rank()
        self.num_replicas: int = grid.data_parallel_size
        self.of_pipeline: list[int] = grid.pp_group
        """The ranks of this pipeline, by stage."""
        self.place = self.stage, self.replica, self.global_rank
        self.num_slices: int = grid.model_parallel_size
        self.slice = int(grid.get_slice_parallel_rank())
        self.is_first_stage = self.stage == 0
        self.is_last_stage = self.stage == self.num_stages - 1
        self.speaks_for_stage = self.replica == 0 and self.slice == 0
        """One of the replicas and tensor-parallel ranks of a stage reports for it."""
        self._grid = grid

    def stage_of(self, rank: int) -> int:
        """The stage of another rank of the job."""
        return int(self._grid._topo.get_coord(rank).pipe)

    def sum_over_replicas(self, tensor: Tensor) -> None:
        """Adds up ``tensor`` over the data-parallel replicas of this stage, in place."""
        if self.num_replicas > 1:
            dist.all_reduce(tensor, group=self._grid.get_data_parallel_group())

    def sum_over_slices(self, tensor: Tensor) -> None:
        """Adds up ``tensor`` over the tensor-parallel ranks of this stage, in place."""
        if self.num_slices > 1:
            dist.all_reduce(tensor, group=self._grid.get_slice_parallel_group())

    def average_over_replicas(self, losses: dict[int, Tensor]) -> dict[int, Tensor]:
        """The mean of each loss over the replicas of this stage: float32 scalars."""
        if not losses:
            return {}
        values = torch.stack([value.detach().reshape(()) for value in losses.values()]).float()
        if self.num_replicas > 1:
            self.sum_over_replicas(values)
            values /= self.num_replicas
        return dict(zip(losses, values.unbind(), strict=True))

    def sum_over_pipeline(self, tensor: Tensor) -> None:
        """Adds up ``tensor`` over the stages, in place."""
        if self.num_stages > 1:
            dist.all_reduce(tensor, group=self._grid.get_pipe_parallel_group())

    def from_last_stage(self, value: Tensor | None) -> Tensor:
        """The last stage's ``value``, on all stages; nan if it has none."""
        shared = torch.full((), math.nan, device=self.device) if value is None else value.clone()
        if self.num_stages > 1:
            source = self._grid.stage_to_global(self.num_stages - 1)
            dist.broadcast(shared, source, group=self._grid.get_pipe_parallel_group())
        return shared
