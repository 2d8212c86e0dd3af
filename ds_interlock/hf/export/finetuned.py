"""A checkpoint of a fine-tuned Hugging Face model: the pipeline's files and those in ``hf/`` beside them."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.description import DESCRIPTION_FILE, ModelDescription
from ds_interlock.hf.export.pipeline_checkpoint import PipelineCheckpoint

_WRITTEN_ANEW = ("config.json", DESCRIPTION_FILE)


class FineTunedCheckpoint(PipelineCheckpoint):
    """A pipeline checkpoint (see there) whose tensors have the names of a transformers model."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.hf_folder = self.folder.parent / "hf"
        self.description = ModelDescription.read(self.hf_folder)

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
