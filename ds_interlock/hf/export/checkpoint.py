"""A DeepSpeed pipeline checkpoint read by one process: all layers, all heads, the plan.

    checkpoints/
      latest
      global_step100/
        layer_00-model_states.pt ...     {name: tensor}, one file per layer with weights
        interlock_stage_00.pt ...        heads, untied copies of tied modules, plan; one file per stage
        hf/                              as below, if a later job described its checkpoints otherwise
      hf/                                of a Hugging Face model, by the job that trains it
        interlock.json                   ModelDescription
        config.json  generation_config.json  tokenizer files

Tensors are mapped from the files, not read, so a model may be larger than memory. DeepSpeed is not needed.
"""

import pickle
import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import AutoConfig

from ds_interlock.checkpoints.folder import latest_folder
from ds_interlock.errors import ConfigError, first_line
from ds_interlock.files import read_record
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead

DESCRIPTION_FILE = "interlock.json"
HF_FOLDER = "hf"
_LAYER_FILE = re.compile(r"layer_(\d+)-(.*)model_states\.pt")
_STAGE_FILE = "interlock_stage_*.pt"


class PipelineCheckpoint:
    """The files of ``.../global_step100``, or of the checkpoint that ``latest`` in ``path`` names."""

    def __init__(self, path: str | Path) -> None:
        self.folder = latest_folder(Path(path)) or Path(path)
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


class ModelDescription(BaseModel):
    """How a transformers model was cut into pipeline layers. Paths are names of modules in the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field(description='Class of the model in transformers, as "LlamaForCausalLM".')
    num_front_layers: int = Field(ge=0, description="Pipeline layers before the first block.")
    num_blocks: int = Field(ge=1)
    embedding: str
    norm: str | None = Field(description="The norm before the unembedding; null if it has none.")
    unembedding: str | None = Field(description="null in a model without one.")
    peft: dict[str, Any] | None = Field(None, description="The adapters' configuration, in peft's form.")
    base_model: str = Field(description="The pretrained model, as the user named it.")


class FineTunedCheckpoint(PipelineCheckpoint):
    """A pipeline checkpoint (see there) whose tensors have the names of a transformers model."""

    def __init__(self, path: str | Path, *, trust_remote_code: bool = False) -> None:
        super().__init__(path)
        self._trust_remote_code = trust_remote_code
        own = self.folder / HF_FOLDER
        self.hf_folder = own if own.is_dir() else self.folder.parent / HF_FOLDER
        self.description = read_record(
            self.hf_folder / DESCRIPTION_FILE,
            ModelDescription,
            what="description of a fine-tuned model",
            hint="launcher/finetune.py writes it beside its checkpoints (launcher/train_lm.py exports its "
            "model itself, at the end of the job)",
        )

    def load_config(self) -> Any:
        """A new object of the model's configuration; ConfigError if it cannot be read."""
        try:
            return AutoConfig.from_pretrained(self.hf_folder, trust_remote_code=self._trust_remote_code)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise ConfigError(
                    f"{self.hf_folder} has code of its own; --trust_remote_code runs it, if you trust it"
                ) from error
            raise ConfigError(f"{self.hf_folder / 'config.json'} cannot be read: {error}") from error

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the layers, adapters included, by full name."""
        return {name: tensor for state in self.layers.values() for name, tensor in state.items()}

    def copy_companions(self, folder: Path, *but: str) -> None:
        """Copies tokenizer and generation configuration: all of ``hf/`` but what the export writes itself."""
        ignored = shutil.ignore_patterns("config.json", DESCRIPTION_FILE, *but)
        shutil.copytree(self.hf_folder, folder, ignore=ignored, dirs_exist_ok=True)


def _load(file: Path) -> Mapping[str, Any]:
    try:
        state: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{file} cannot be read ({first_line(error)}): the checkpoint is damaged or incomplete; export "
            "another one"
        ) from error
    return state
