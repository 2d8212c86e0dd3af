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
    """A pipeline checkpoint whose tensors have the names of a transformers model.

    Args:
        path: As for ``PipelineCheckpoint``.

    Raises:
        ConfigError: If there is no such checkpoint, or no description of the model beside it.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.hf_folder = self.folder.parent / "hf"
        self.description = ModelDescription.read(self.hf_folder)

    def load_config(self) -> Any:
        """The configuration of the model as it was loaded; each call returns another one.

        Raises:
            ConfigError: If it cannot be read.
        """
        try:
            return AutoConfig.from_pretrained(self.hf_folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.hf_folder / 'config.json'} cannot be read: {error}") from error

    def tensors(self) -> dict[str, Tensor]:
        """All that the layers hold, adapters included, by full name."""
        return {name: tensor for state in self.layers.values() for name, tensor in state.items()}

    def copy_companions(self, folder: Path, *but: str) -> None:
        """Copies tokenizer and generation configuration, all that is in ``hf/`` but what is written anew."""
        ignored = shutil.ignore_patterns(*_WRITTEN_ANEW, *but)
        shutil.copytree(self.hf_folder, folder, ignore=ignored, dirs_exist_ok=True)
