"""Checkpoints: DeepSpeed's files, and beside them what DeepSpeed does not keep.

    save_dir/
      latest                               the newest complete checkpoint's tag
      global_step100/
        layer_00-model_states.pt ...       layers (DeepSpeed)
        mp_rank_00_model_states.pt ...     optimizer, scheduler, counters, a file a stage (DeepSpeed)
        interlock_stage_00.pt ...          heads and untied copies of tied modules, a file a stage
        interlock_rank_00000.pt ...        random state and data position, a file a rank

A checkpoint is written under another name and renamed once every rank has finished: an interrupted
save never replaces a good one. Resumed in the same mode, training continues bit for bit.
"""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.utils import logger
from torch import distributed as dist

from ds_interlock.errors import ConfigError
from ds_interlock.files import replace_text

_UNFINISHED = ".unfinished"
_REPLACED = ".replaced"


class CheckpointMixin:
    """``save_checkpoint`` and ``load_checkpoint`` of the engine."""

    _consumed = 0
    """Micro-batches this rank has read for training since the run began, resumed ones included."""

    def save_checkpoint(
        self: Any,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Saves everything a resumed run needs. As DeepSpeed's; all ranks must call it."""
        self.drain()
        tag = str(tag or f"global_step{self.global_steps}")
        unfinished = tag + _UNFINISHED
        folder = Path(save_dir) / unfinished
        writes = self.global_rank == 0 or (self.use_node_local_storage() and self.local_rank == 0)
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        super().save_checkpoint(  # type: ignore[misc]
            str(save_dir), unfinished, client_state or {}, False, exclude_frozen_parameters
        )
        if self.grid.get_data_parallel_rank() == 0:
            torch.save(_stage_state(self), folder / f"interlock_stage_{self.stage_id:02d}.pt")
        torch.save(_rank_state(self), folder / f"interlock_rank_{self.global_rank:05d}.pt")
        dist.barrier()
        if writes:
            _put_in_place(folder, Path(save_dir) / tag)
            if save_latest:
                replace_text(Path(save_dir) / "latest", tag)
        dist.barrier()
        return True

    def load_checkpoint(
        self: Any,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Loads a checkpoint. As DeepSpeed's; all ranks must call it.

        ``load_module_only`` takes layers, and the heads that sit where this plan has one, from a
        checkpoint of any mode; otherwise the mode must be the one that saved it.

        Raises:
            ConfigError: If the checkpoint was saved under another plan and more than the module is
                asked for.
        """
        if tag is None:
            latest = Path(load_dir) / "latest"
            if not latest.is_file():
                logger.warning(
                    f"no checkpoint in {load_dir}: there is no file 'latest', and no tag was given"
                )
                return None, None
            tag = latest.read_text().strip()
        tag = _still_there(Path(load_dir), str(tag))
        folder = Path(load_dir) / tag
        stage_state = _load(folder / f"interlock_stage_{self.stage_id:02d}.pt")
        if not load_module_only:
            _check_plan(stage_state, self, folder)
        keeps_optimizer = _keeps_optimizer(self)
        # Heads are not layers: they must be in place before the optimizer takes its masters from them.
        _load_stage_state(stage_state, self, strict=not load_module_only)
        path, client_state = super().load_checkpoint(  # type: ignore[misc]
            str(load_dir),
            tag,
            load_module_strict,
            load_optimizer_states and not keeps_optimizer,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        if path is not None and not load_module_only:
            rank_state = _load(folder / f"interlock_rank_{self.global_rank:05d}.pt")
            if keeps_optimizer and load_optimizer_states:
                own = {dist.get_rank(self.optimizer.dp_process_group): rank_state["optimizer"]}
                self.optimizer.load_state_dict(own, load_from_fp32_weights=True)
            self._restore_data_position(rank_state["consumed_micro_batches"], rank_state["data_iterator"])
            _restore_random_state(rank_state, self)
        self._enter_phase()  # that of the steps done when it was saved
        dist.barrier()
        return path, client_state

    def _restore_data_position(self: Any, consumed: int, iterator_state: Any) -> None:
        """Goes on in the data where the saved run was."""
        self._consumed = consumed
        if not self.is_first_stage():
            return
        loader = self.training_dataloader
        if iterator_state is not None and hasattr(self.data_iterator, "load_state_dict"):
            self.data_iterator.load_state_dict(iterator_state)
        elif loader is not None:
            if isinstance(loader, RepeatingLoader):
                loader.data_iter = iter(loader.loader)  # iter() alone goes on where it is
            self.set_dataloader(loader)
            for _ in range(consumed):
                next(self.data_iterator)
        elif consumed:
            logger.warning(
                f"the data iterator cannot be put back: skip {consumed} micro-batches on stage 0 "
                "(engine.consumed_micro_batches) before the next train_batch"
            )

    @property
    def consumed_micro_batches(self) -> int:
        """Micro-batches read for training since the run began, by this rank (only stage 0 reads)."""
        return self._consumed


def _stage_state(engine: Any) -> dict[str, Any]:
    """What belongs to a stage and is the same on all its replicas."""
    module = engine.module
    return {
        "heads": module.heads.state_dict(),
        "head_places": _places(module.schedule.heads),
        "tied_modules": {} if module.tied_comms else module.tied_modules.state_dict(),
        "plan": _describe(engine.plan),
        "schedule": _described_phases(engine),
        "micro_offset": module.micro_offset,
    }


def _rank_state(engine: Any) -> dict[str, Any]:
    """What belongs to one rank."""
    iterator: Any = engine.data_iterator if engine.is_first_stage() else None
    return {
        "consumed_micro_batches": engine._consumed,
        "data_iterator": iterator.state_dict() if hasattr(iterator, "state_dict") else None,
        "python_random": random.getstate(),
        "numpy_random": np.random.get_state(),
        "torch_random": torch.get_rng_state(),
        "device_random": get_accelerator().get_rng_state() if engine.device.type != "cpu" else None,
        "optimizer": engine.optimizer.state_dict() if _keeps_optimizer(engine) else None,
    }


def _restore_random_state(state: dict[str, Any], engine: Any) -> None:
    random.setstate(state["python_random"])
    np.random.set_state(state["numpy_random"])
    torch.set_rng_state(state["torch_random"])
    if state["device_random"] is not None:
        get_accelerator().set_rng_state(state["device_random"])


def _keeps_optimizer(engine: Any) -> bool:
    """True where DeepSpeed saves an optimizer it cannot load: bf16 without ZeRO.

    Its BF16_Optimizer is cut over the replicas, but only the first one's part is written.
    """
    return bool(engine.using_bf16_optimizer and not engine.zero_optimization())


def _places(heads: Any) -> list[tuple[int, int, float]]:
    return [(head.stage, head.after_layer, head.weight) for head in heads]


def _saved_places(state: dict[str, Any]) -> list[Any]:
    return list(state.get("head_places", state["plan"]["heads"][:-1]))


def _describe(plan: Any) -> dict[str, Any]:
    return {
        "stage_bounds": list(plan.stage_bounds),
        "heads": _places(plan.heads),
        "trained_by": [sorted(losses) for losses in plan.trained_by],
    }


def _described_phases(engine: Any) -> list[dict[str, Any]]:
    phases = engine.module.schedule.phases
    return [{"from_step": phase.from_step, **_describe(phase.plan)} for phase in phases]


def _check_plan(state: dict[str, Any], engine: Any, folder: Path) -> None:
    # Before there were schedules, a checkpoint had one plan.
    saved, now = state.get("schedule", [{"from_step": 0, **state["plan"]}]), _described_phases(engine)
    if len(saved) != len(now):
        different = "its schedule has " + (f"{len(saved)} phases" if len(saved) > 1 else "1 phase")
    else:
        keys = [key for key in now[0] if any(a[key] != b[key] for a, b in zip(saved, now, strict=True))]
        different = f"{', '.join(keys)} differ"
    if saved != now:
        raise ConfigError(
            f"{folder} was saved under another gradient-flow plan ({different}): optimizer state "
            'cannot be carried over. Use the same "interlock" section and number of stages, or take the '
            "weights alone with load_checkpoint(..., load_module_only=True)"
        )


def _load_stage_state(state: dict[str, Any], engine: Any, strict: bool) -> None:
    module = engine.module
    if strict:
        module.heads.load_state_dict(state["heads"])
    else:
        at = {tuple(place): str(number) for number, place in enumerate(_saved_places(state))}
        places = _places(module.schedule.heads)
        for number, head in module.heads.items():
            found = at.get(places[int(number)])
            own = {k.partition(".")[2]: v for k, v in state["heads"].items() if k.partition(".")[0] == found}
            if own:
                head.load_state_dict(own)
    if state["tied_modules"] and not module.tied_comms:
        module.tied_modules.load_state_dict(state["tied_modules"])
    module.micro_offset = state["micro_offset"]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing: this is not a complete checkpoint of ds_interlock with as many ranks as now"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return state


def _put_in_place(folder: Path, final: Path) -> None:
    """Gives a complete checkpoint its name; one that had it is removed only afterwards."""
    old = final.with_name(final.name + _REPLACED)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _still_there(save_dir: Path, tag: str) -> str:
    """A save that replaces a checkpoint may have been cut off between its two renames."""
    is_moved = not (save_dir / tag).is_dir() and (save_dir / (tag + _REPLACED)).is_dir()
    return tag + _REPLACED if is_moved else tag
