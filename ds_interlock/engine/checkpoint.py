"""Checkpoints: DeepSpeed's files, and beside them what DeepSpeed does not keep.

    save_dir/
      latest                               the newest complete checkpoint's tag
      global_step100/
        interlock_files.json               names and sizes of the files
        layer_00-model_states.pt ...       layers (DeepSpeed)
        mp_rank_00_model_states.pt ...     optimizer, scheduler, counters; one file per stage (DeepSpeed)
        interlock_stage_00.pt ...          heads, what they read with, untied copies of tied modules
        interlock_rank_00000.pt ...        random state and data position; one file per rank

A checkpoint is written under another name and renamed once every rank has finished: an interrupted save never
replaces a good one. With ``async_save`` that happens while training goes on (``checkpoints/background.py``).
"""

import os
import random as python_random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from torch import distributed as dist

from ds_interlock.checkpoints.background import BackgroundWriter
from ds_interlock.checkpoints.folder import (
    REPLACED,
    UNFINISHED,
    find_fault,
    folder_of,
    latest_folder,
    newest_first,
    write_list,
)
from ds_interlock.checkpoints.stages import State, fits, read_file
from ds_interlock.config import InterlockConfig
from ds_interlock.engine.data import TrainingData
from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.engine.module import InterlockPipelineModule
from ds_interlock.engine.reports import job_store
from ds_interlock.errors import ConfigError, DataError
from ds_interlock.files import replace_folder, replace_text
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead
from ds_interlock.transport.agreement import barrier, gather, raised_by_all
from ds_interlock.transport.ranks import StageRanks

Loaded = tuple[str | None, dict[str, Any] | None]
"""What DeepSpeed's ``load_checkpoint`` returns."""


@dataclass
class Checkpoints:
    """Writes and reads what DeepSpeed does not keep, in DeepSpeed's folders."""

    engine: DeepSpeedSide
    ranks: StageRanks
    data: TrainingData
    config: InterlockConfig
    heads_aside: dict[int, State] = field(default_factory=dict)
    """Saved heads that this run does not use, by the number of layers before them, for runs that do."""

    def __post_init__(self) -> None:
        limit = self.config.checkpoint_timeout_seconds
        self._writer = BackgroundWriter(job_store(), dist.get_world_size(), limit)

    @property
    def keeps_optimizer(self) -> bool:
        """Whether DeepSpeed writes only the first replica's part of the optimizer: bf16 without ZeRO."""
        return self.engine.using_bf16_optimizer and not self.engine.zero_optimization()

    def agreed_tag(self, tag: str | None) -> str:
        """``tag``, by default that of the step; ConfigError on all ranks if theirs differ."""
        tags = gather(f"global_step{self.engine.global_steps}" if tag is None else str(tag))
        for rank, other in enumerate(tags):
            if other != tags[0]:
                raise ConfigError(
                    f"save_checkpoint got the tag {tags[0]!r} on rank 0 and {other!r} on rank {rank}: "
                    "expected the same on all ranks. If it has the loss in it: what train_batch returns "
                    "while stages stream differs between ranks, what engine.drain() returns does not"
                )
        return tags[0]

    @contextmanager
    def new(self, save_dir: Path, tag: str, *, writes: bool, save_latest: bool) -> Iterator[str]:
        """Gives the tag for DeepSpeed to save its files under. The checkpoint is complete after the block.

        A rank that ``writes`` makes and renames folders.
        """
        complete = folder_of(save_dir, tag)
        folder = complete.with_name(tag + UNFINISHED)
        if writes:
            for left_over in save_dir.glob("*" + UNFINISHED):  # by a run that was killed
                shutil.rmtree(left_over, ignore_errors=True)
        barrier()
        with self._saving() as save:
            yield folder.name
            state = stage_state(self.engine.module) | {"topology": self._topology()}
            if self.ranks.replica == 0:
                save({**state, "heads_aside": self.heads_aside}, self._stage_file(folder))
            save(self._rank_state(), self._rank_file(folder))
        step = self.engine.global_steps

        def finish() -> None:
            write_list(folder, step)
            replace_folder(complete, folder, complete.with_name(tag + REPLACED))
            if save_latest:
                replace_text(save_dir / "latest", tag)

        barrier()
        if self.config.async_save:
            self._writer.start(finish if writes else None)
            return
        if writes:
            finish()
        barrier()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, if any; raises what went wrong with it."""
        self._writer.finish()

    @contextmanager
    def _saving(self) -> Iterator[Callable[[Any, Path], None]]:
        """Gives ``torch.save``; with ``async_save`` all that is saved, by DeepSpeed too, goes to memory."""
        if not self.config.async_save:
            yield torch.save
            return
        self._writer.discard()
        own = self.engine.checkpoint_engine.save
        self.engine.checkpoint_engine.save = self._writer.save
        try:
            yield self._writer.save
        finally:
            self.engine.checkpoint_engine.save = own

    def find(self, load_dir: str | os.PathLike[str], tag: str | None) -> Path | None:
        """The folder of the checkpoint with ``tag``, by default the newest one; None if none exists.

        Reads all of it once, each rank a share of its files. All ranks must call it.

        Raises:
            ConfigError: On all ranks, if it is damaged or incomplete: names the newest one that is not.
        """
        self.wait()
        folder = latest_folder(Path(load_dir)) if tag is None else folder_of(Path(load_dir), tag)
        if folder is None:
            logger.warning(f"no checkpoint in {load_dir}: it has no file 'latest', and tag is None")
            return None
        # A save that replaces a checkpoint may have been cut off between its two renames.
        replaced = folder.with_name(folder.name + REPLACED)
        folder = replaced if not folder.is_dir() and replaced.is_dir() else folder
        fault = self._find_fault(folder)
        if fault is None:
            return folder
        others = [other for other in newest_first(folder.parent) if other != folder]
        whole = next((other for other in others if self._find_fault(other) is None), None)
        hint = (
            f"load {whole.name}, the newest whole one" if whole else f"no other in {folder.parent} is whole"
        )
        raise ConfigError(f"{fault}: the checkpoint {folder.name} cannot be used; {hint}")

    def _find_fault(self, folder: Path) -> str | None:
        """The first fault that a rank finds, on all ranks."""
        ranks = self.ranks.global_rank, dist.get_world_size()
        share = slice(None) if self.engine.use_node_local_storage() else slice(ranks[0], None, ranks[1])
        return next(filter(None, gather(find_fault(folder, share))), None)

    def is_of_this_run(self, folder: Path) -> bool:
        """Whether all of it is for the same ranks, plan and heads as now. All ranks must call it."""
        module, file, topology = self.engine.module, self._stage_file(folder), self._topology()
        state = read_file(file) if file.is_file() else {}
        own = stage_state(module)
        same = (
            state.get("schedule") == own["schedule"]
            and state.get("topology", topology) == topology
            and fits(state["heads"], own["heads"])
        )
        return all(gather(same))

    def is_where_it_was(self, states: Sequence[State]) -> bool:
        """Whether this rank had the same layers when ``states``, of all stages, were saved."""
        same_layers = states[0]["plan"]["stage_bounds"] == list(self.engine.module.plan.stage_bounds)
        saved = states[self.ranks.stage].get("topology", {}) if same_layers else {}
        return bool(saved.get("ranks") == self._topology()["ranks"])

    def load(self, folder: Path, deepspeed_loads: Callable[..., Loaded], with_optimizer: bool) -> Loaded:
        """Loads one of this run; returns what ``deepspeed_loads``, which loads DeepSpeed's files, returns."""
        with raised_by_all():
            state, of_rank = read_file(self._stage_file(folder)), read_file(self._rank_file(folder))
        module = self.engine.module
        module.heads.load_state_dict(state["heads"])  # before the optimizer copies them
        if state["tied_modules"] and not module.tied_comms:
            module.tied_modules.load_state_dict(state["tied_modules"])
        module.micro_offset = state["micro_offset"]
        if module.copies is not None:
            module.copies.restore(state.get("copies"))
        self.heads_aside = state.get("heads_aside", {})
        result = deepspeed_loads(load_optimizer_states=with_optimizer and not self.keeps_optimizer)
        if result[0] is not None:
            if self.keeps_optimizer and with_optimizer:
                load_flat_copies(self.engine.optimizer, of_rank["optimizer"])
            elif self.keeps_optimizer:
                self.engine.optimizer.refresh_fp32_params()
            self.restore(of_rank)
        return result

    def restore_copies(self, state: State | None) -> None:
        """Gives shared readouts the saved copies, or the live ones if there are none. For all ranks."""
        copies = self.engine.module.copies
        if copies is not None and state is None:
            copies.refresh()
        elif copies is not None:
            copies.restore(state)

    def restore(self, state: State, *, random: bool = True) -> None:
        """Continues in the data where the rank was that had this state, and with its random numbers."""
        with raised_by_all():
            try:
                self.data.restore(state)
            except DataError as error:
                raise ConfigError(f"{error}; use the same data, or load_module_only=True") from error
        if not random:
            return
        python_random.setstate(state["python_random"])
        np.random.set_state(state["numpy_random"])
        torch.set_rng_state(state["torch_random"])
        if state["device_random"] is not None:
            get_accelerator().set_rng_state(state["device_random"])

    def _topology(self) -> State:
        """Which ranks have this stage, and what its optimizer's state looks like. All ranks must call it."""
        engine, ranks = self.engine, self.ranks
        of_stage = [(replica, rank) for stage, replica, rank in gather(ranks.place) if stage == ranks.stage]
        kind = "bf16" if self.keeps_optimizer else "zero" if engine.zero_optimization() else "torch"
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        groups = engine.optimizer.param_groups if kind == "torch" and engine.optimizer is not None else ()
        return {
            "ranks": [rank for _, rank in sorted(of_stage)],
            "num_slices": ranks.num_slices,
            "optimizer": kind,
            "names": [[names.get(id(parameter), "") for parameter in group["params"]] for group in groups],
        }

    def _rank_state(self) -> State:
        on_cpu = self.ranks.device.type == "cpu"
        return {
            **self.data.state(),
            "python_random": python_random.getstate(),
            "numpy_random": np.random.get_state(),
            "torch_random": torch.get_rng_state(),
            "device_random": None if on_cpu else get_accelerator().get_rng_state(),
            "optimizer": self.engine.optimizer.state_dict() if self.keeps_optimizer else None,
        }

    def _stage_file(self, folder: Path) -> Path:
        return folder / f"interlock_stage_{self.ranks.stage:02d}.pt"

    def _rank_file(self, folder: Path) -> Path:
        return folder / f"interlock_rank_{self.ranks.global_rank:05d}.pt"


def load_flat_copies(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads this rank's part of DeepSpeed's bf16 or ZeRO optimizer, the float32 weights with it."""
    own = {dist.get_rank(optimizer.dp_process_group): state}
    optimizer.load_state_dict(own, load_from_fp32_weights=True)


def stage_state(module: InterlockPipelineModule) -> dict[str, Any]:
    """What belongs to a stage and is the same on all its replicas."""
    return {
        "heads": module.heads.state_dict(),
        "head_places": _positions(module.schedule.heads),
        "copies": None if module.copies is None else module.copies.state(),
        "tied_modules": {} if module.tied_comms else module.tied_modules.state_dict(),
        "plan": _described(module.plan),
        "schedule": _described_phases(module),
        "micro_offset": module.micro_offset,
    }


def _positions(heads: Sequence[LossHead]) -> list[tuple[int, int, float]]:
    return [(head.stage, head.after_layer, head.weight) for head in heads]


def _described(plan: GradientFlowPlan) -> dict[str, Any]:
    return {
        "stage_bounds": list(plan.stage_bounds),
        "heads": _positions(plan.heads),
        "trained_by": [sorted(losses) for losses in plan.trained_by],
    }


def _described_phases(module: InterlockPipelineModule) -> list[dict[str, Any]]:
    return [{"from_step": phase.from_step, **_described(phase.plan)} for phase in module.schedule.phases]
