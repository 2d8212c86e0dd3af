"""``hf/interlock.json``: what export needs of a fine-tuned model besides its Hugging Face files.

checkpoints/
  global_step100/ ...
  hf/                    written once, by the job
    interlock.json       ModelDescription
    config.json  generation_config.json  tokenizer files
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_interlock.errors import ConfigError, list_faults
from ds_interlock.files import replace_text

DESCRIPTION_FILE = "interlock.json"


class ModelDescription(BaseModel):
    """How a transformers model was cut into pipeline layers. Paths are names of modules in the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field(description='Class of the model in transformers, as "LlamaForCausalLM".')
    num_front_layers: int = Field(ge=0, description="Pipeline layers before the first block.")
    num_blocks: int = Field(ge=1)
    blocks: str = Field(description='The list of blocks, as "model.layers".')
    embedding: str
    norm: str | None = Field(description="The norm before the unembedding; null if it has none.")
    unembedding: str | None = Field(description="null in a model without one.")
    tied: bool = Field(description="Whether the unembedding's weight was the embedding's at the start.")
    peft: dict[str, Any] | None = Field(None, description="The adapters' configuration, in peft's form.")
    base_model: str = Field(description="The pretrained model, as the user named it.")

    @classmethod
    def read(cls, folder: Path) -> "ModelDescription":
        """Reads ``folder/interlock.json``; ConfigError if it is missing or invalid."""
        file = folder / DESCRIPTION_FILE
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{file} is missing: launcher/finetune.py writes it beside its checkpoints, and export needs "
                "it (launcher/train_lm.py exports its model itself, at the end of the job)"
            ) from error
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            raise ConfigError(list_faults(str(file), faults)) from error

    def write(self, folder: Path) -> None:
        """Writes ``folder/interlock.json``."""
        replace_text(folder / DESCRIPTION_FILE, self.model_dump_json(indent=2) + "\n")
