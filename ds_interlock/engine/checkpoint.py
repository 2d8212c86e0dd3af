"""Checkpoints: DeepSpeed's files, and beside them what DeepSpeed does not keep.

    save_dir/
      latest                               the newest complete checkpoint's tag
      global_step100/
        interlock_files.json               names and sizes of the files
        layer_00-model_states.pt ...       layers (DeepSpeed)
        mp_rank_00_model_states.pt ...     optimizer, scheduler, counters; one file per stage (DeepSpeed)
        interlock_stage_00.pt ...          heads and untied copies of tied modules; one file per stage
        interlock_rank_00000.pt ...        random state and data position; one file per rank

A checkpoint is written under another name and renamed once every rank has finished: an interrupted save never
replaces a good one.
"""

import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from deepspeed.utils.tensor_fragment import fragment_address
from torch import distributed as dist

from ds_interlock.checkpoints.folder import (
    REPLACED,
    UNFINISHED,
    find_fault,
    folder_of,
    latest_folder,
    newest_first,
    write_list,
)
from ds_interlock.engine.data import TrainingData
from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.engine.module import InterlockPipelineModule
from ds_interlock.errors import ConfigError
from ds_interlock.files import replace_folder, replace_text
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead
from ds_interlock.transport.ranks import StageRanks

Loaded = tuple[str | None, dict[str, Any] | None]
"""What DeepSpeed's ``load_checkpoint`` returns."""

_SAFE: list[Any] = [
    *(fragment_address, np.ndarray, np.dtype, type(np.dtype(np.uint32))),
    *(value.__reduce__()[0] for value in (np.zeros(1), np.float64(0))),
]
"""What these files hold beside tensors and plain values: where DeepSpeed's bf16 optimizer has its parameters,
and numpy's random state."""


@dataclass
class Checkpoints:
    """Writes and reads what DeepSpeed does not keep, in DeepSpeed's folders."""

    engine: DeepSpeedSide
    ranks: StageRanks
    data: TrainingData

    @property
    def keeps_optimizer(self) -> bool:
        """Whether DeepSpeed writes only the first replica's part of the optimizer: bf16 without ZeRO."""
        return self.engine.using_bf16_optimizer and not self.engine.zero_optimization()

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
        dist.barrier()
        yield folder.name
        if self.ranks.replica == 0:
            torch.save(stage_state(self.engine.module), self._stage_file(folder))
        torch.save(self._rank_state(), self._rank_file(folder))
        dist.barrier()
        if writes:
            write_list(folder, self.engine.global_steps)
            replace_folder(complete, folder, complete.with_name(tag + REPLACED))
            if save_latest:
                replace_text(save_dir / "latest", tag)
        dist.barrier()

    def find(self, load_dir: str | os.PathLike[str], tag: str | None) -> Path | None:
        """The folder of the checkpoint with ``tag``, by default the newest one; None if none exists.

        Reads all of it once, each rank a share of its files. All ranks must call it.

        Raises:
            ConfigError: On all ranks, if it is damaged or incomplete: names the newest one that is not.
        """
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
        faults: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(faults, find_fault(folder, share))
        return next(filter(None, faults), None)

    def load(
        self, folder: Path, deepspeed_loads: Callable[..., Loaded], module_only: bool, with_optimizer: bool
    ) -> Loaded:
        """Loads it; returns what ``deepspeed_loads``, which loads DeepSpeed's files, returns."""
        self._load_stage(folder, module_only=module_only)
        result = deepspeed_loads(load_optimizer_states=with_optimizer and not self.keeps_optimizer)
        if result[0] is not None and not module_only:
            self._load_rank(folder, with_optimizer=with_optimizer)
        return result

    def _load_stage(self, folder: Path, *, module_only: bool) -> None:
        """Loads heads and untied modules. They must have their values before the optimizer copies them."""
        state, module = _load(self._stage_file(folder)), self.engine.module
        if module_only:
            self._load_matching_heads(state)
        else:
            _check_plan(state, module, folder)
            module.heads.load_state_dict(state["heads"])
        if state["tied_modules"] and not module.tied_comms:
            module.tied_modules.load_state_dict(state["tied_modules"])
        module.micro_offset = state["micro_offset"]

    def _load_rank(self, folder: Path, *, with_optimizer: bool) -> None:
        """Loads random state and data position, and an optimizer that DeepSpeed cannot load."""
        state = _load(self._rank_file(folder))
        if self.keeps_optimizer and with_optimizer:
            load_flat_copies(self.engine.optimizer, state["optimizer"])
        elif self.keeps_optimizer:
            self.engine.optimizer.refresh_fp32_params()
        self.data.restore(state["consumed_micro_batches"], state["data_iterator"])
        random.setstate(state["python_random"])
        np.random.set_state(state["numpy_random"])
        torch.set_rng_state(state["torch_random"])
        if state["device_random"] is not None:
            get_accelerator().set_rng_state(state["device_random"])

    def _load_matching_heads(self, state: dict[str, Any]) -> None:
        """Loads the heads whose position is the same in both plans."""
        numbers = {tuple(position): str(number) for number, position in enumerate(state["head_places"])}
        positions = _positions(self.engine.module.schedule.heads)
        for number, head in self.engine.module.heads.items():
            prefix = f"{numbers.get(positions[int(number)])}."
            own = {k.removeprefix(prefix): v for k, v in state["heads"].items() if k.startswith(prefix)}
            if own:
                head.load_state_dict(own)

    def _rank_state(self) -> dict[str, Any]:
        on_cpu = self.ranks.device.type == "cpu"
        return {
            "consumed_micro_batches": self.data.consumed,
            "data_iterator": self.data.iterator_state(),
            "python_random": random.getstate(),
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


def _check_plan(state: dict[str, Any], module: InterlockPipelineModule, folder: Path) -> None:
    saved, present = state["schedule"], _described_phases(module)
    if saved != present:
        pairs = list(zip(saved, present, strict=False))
        different = [key for key in present[0] if any(a[key] != b[key] for a, b in pairs)]
        raise ConfigError(
            f"{folder} was saved under another gradient-flow plan ({', '.join(different or ['phases'])} "
            'differ): use the same "interlock" section and number of stages, or '
            "load_checkpoint(..., load_module_only=True)"
        )


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} is missing: this is no complete checkpoint of as many ranks as now")
    try:
        with torch.serialization.safe_globals(_SAFE):
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} holds objects, such as a state_dict() of the data iterator may return, that torch loads "
            "only if they are declared safe: keep plain values there, or call "
            f"torch.serialization.add_safe_globals first: {error}"
        ) from error
    return state
