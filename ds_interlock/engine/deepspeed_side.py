"""What the parts of the engine use of DeepSpeed's pipeline engine, which has no types of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from deepspeed.runtime.pipe import p2p

from ds_interlock.engine.instructions import InterlockSchedule
from ds_interlock.engine.module import InterlockPipelineModule


class DeepSpeedSide(Protocol):
    """DeepSpeed's ``PipelineEngine``, as far as it is used here."""

    module: InterlockPipelineModule
    optimizer: Any
    """DeepSpeed's, or torch's."""
    monitor: Any
    mpu: Any
    data_iterator: Any
    training_dataloader: Any
    batch_fn: Any
    micro_batches: int
    global_steps: int
    global_samples: int
    skipped_steps: int
    timers: Any
    using_bf16_optimizer: bool
    checkpoint_engine: Any
    lr_scheduler: Any
    mp_world_size: int
    """Stages, times tensor-parallel ranks."""
    checkpoint_mp_rank: int

    def _exec_schedule(self, pipe_schedule: InterlockSchedule) -> None: ...
    def _get_ckpt_name(self, checkpoints_path: str, tag: str) -> str: ...
    def _get_rank_zero_ckpt_name(
        self, checkpoints_path: str, tag: str, mp_rank: int, dp_rank: int, bf16_mode: bool
    ) -> str: ...
    def bfloat16_enabled(self) -> bool: ...
    def gradient_clipping(self) -> float: ...
    def set_dataiterator(self, iterator: Iterator[Any]) -> None: ...
    def set_dataloader(self, loader: Any) -> None: ...
    def steps_per_print(self) -> int | None: ...
    def torch_autocast_dtype(self) -> torch.dtype | None: ...
    def torch_autocast_enabled(self) -> bool: ...
    def train_micro_batch_size_per_gpu(self) -> int: ...
    def use_node_local_storage(self) -> bool: ...
    def wall_clock_breakdown(self) -> bool: ...
    def zero_optimization(self) -> bool: ...


@contextmanager
def without_first_message() -> Iterator[None]:
    """DeepSpeed's engine, when it is made, sends a zero over each link, on a group of the whole job.

    Messages here have communicators of their own, and gloo sends nothing that is on a GPU.
    """
    send, recv = p2p.send, p2p.recv
    p2p.send = p2p.recv = lambda *_: None
    try:
        yield
    finally:
        p2p.send, p2p.recv = send, recv
