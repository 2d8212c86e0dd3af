"""A checkpoint of a fine-tuned Hugging Face model, and what the job writes beside it for export.

checkpoints/
  global_step100/ ...
  hf/                    written once, by the job
    interlock.json       ModelDescription
    config.json  generation_config.json  tokenizer files
"""

import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import AutoConfig

from ds_interlock.errors import ConfigError
from ds_interlock.files import read_record
from ds_interlock.hf.export.pipeline_checkpoint import PipelineCheckpoint

DESCRIPTION_FILE = "interlock.json"
_WRITTEN_ANEW = ("config.json", DESCRIPTION_FILE)


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

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.hf_folder = self.folder.parent / "hf"
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
            return AutoConfig.from_pretrained(self.hf_folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.hf_folder / 'config.json'} cannot be read: {error}") from error

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the layers, adapters included, by full name."""
        return {name: tensor for state in self.layers.values() for name, tensor in state.items()}

    def copy_companions(self, folder: Path, *but: str) -> None:
        """Copies tokenizer and generation configuration: all of ``hf/`` but what the export writes itself."""
        ignored = shutil.ignore_patterns(*_WRITTEN_ANEW, *but)
        shutil.copytree(self.hf_folder, folder, ignore=ignored, dirs_exist_ok=True)
