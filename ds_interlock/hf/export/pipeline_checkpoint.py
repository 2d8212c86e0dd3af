"""A DeepSpeed pipeline checkpoint read by one process: all layers, all heads, the plan.

    checkpoints/
      latest
      global_step100/
        layer_00-model_states.pt ...     {name: tensor}, one file per layer with weights
        interlock_stage_00.pt ...        heads, untied copies of tied modules, plan; one file per stage

Tensors are mapped from the files, not read, so a model may be larger than memory. DeepSpeed is not needed.
"""

import pickle
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.conversion import first_line
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead

_LAYER_FILE = re.compile(r"layer_(\d+)-(.*)model_states\.pt")
_STAGE_FILE = "interlock_stage_*.pt"


class PipelineCheckpoint:
    """The files of one checkpoint, opened when they are needed.

    Args:
        path: The folder of one checkpoint (``.../global_step100``), or the one above it, whose ``latest``
            file names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        latest = self.folder / "latest"
        if latest.is_file():
            self.folder /= latest.read_text(encoding="utf-8").strip()
        self._layer_files: dict[int, Path] = {}
        for file in sorted(self.folder.glob("layer_*")):
            if match := _LAYER_FILE.fullmatch(file.name):
                if match[2]:
                    raise ConfigError(
                        f"{file} holds a slice of a layer: export of tensor-parallel models is not supported"
                    )
                self._layer_files[int(match[1])] = file
        if not self._layer_files:
            raise ConfigError(
                f"{self.folder} holds no layer_*-model_states.pt: expected a DeepSpeed pipeline checkpoint"
            )

    @cached_property
    def layers(self) -> Mapping[int, Mapping[str, Tensor]]:
        """The state dict of every layer that has one, by its number."""
        return {number: _load(file) for number, file in self._layer_files.items()}

    @cached_property
    def _stages(self) -> list[Mapping[str, Any]]:
        # By length first: 100 comes after 99.
        files = sorted(self.folder.glob(_STAGE_FILE), key=lambda file: (len(file.name), file.name))
        return [_load(file) for file in files]

    @property
    def untied_copies(self) -> Mapping[str, Tensor]:
        """The last stage's own copies of tied modules (``tied_weights: "untie"``), by names within them."""
        copies = self._stages[-1].get("tied_modules", {}) if self._stages else {}
        return {name.partition(".")[2]: tensor for name, tensor in copies.items()}

    @property
    def heads(self) -> Mapping[int, Mapping[str, Tensor]]:
        """The state dict of every auxiliary head of the plan, by the index of its loss."""
        heads: dict[int, dict[str, Tensor]] = {}
        for stage in self._stages:
            # A run with a schedule has heads that its present plan does not use.
            losses = {after_layer: loss for loss, (_, after_layer, _) in enumerate(stage["plan"]["heads"])}
            for name, tensor in stage["heads"].items():
                number, _, name_in_head = name.partition(".")
                _, after_layer, _ = stage["head_places"][int(number)]
                if after_layer in losses:
                    heads.setdefault(losses[after_layer], {})[name_in_head] = tensor
        return dict(sorted(heads.items()))

    @property
    def plan(self) -> GradientFlowPlan:
        """The plan it was trained under; with a schedule, the plan of its last step."""
        if not self._stages:
            raise ConfigError(
                f"{self.folder} holds no {_STAGE_FILE}: expected a checkpoint that ds_interlock saved"
            )
        saved = self._stages[0]["plan"]
        return GradientFlowPlan(
            stage_bounds=tuple(saved["stage_bounds"]),
            heads=tuple(LossHead(*place) for place in saved["heads"]),
            trained_by=tuple(frozenset(losses) for losses in saved["trained_by"]),
        )


def _load(file: Path) -> Mapping[str, Any]:
    try:
        state: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{file} cannot be read ({first_line(error)}): the checkpoint is damaged or incomplete; export "
            "another one"
        ) from error
    return state
