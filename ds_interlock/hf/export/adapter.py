"""Adapters (LoRA and its variants): written in peft's own format, or merged into the model.

Both let peft do the work, on the architecture with its adapters, built again without weights:

    config.json + LoraConfig ──► peft model without weights
                                    ├─► names of an adapter file       export_adapter
    tensors of the layers ──────────┴─► merge_and_unload               merged_tensors
"""

import warnings
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ds_interlock.errors import ConfigError, first_names
from ds_interlock.hf.export.checkpoint import DESCRIPTION_FILE, FineTunedCheckpoint
from ds_interlock.hf.export.model_folder import ExportReport, check_tensors, new_folder
from ds_interlock.hf.model.anatomy import find_anatomy
from ds_interlock.hf.model.four_bits import in_full
from ds_interlock.hf.model.pretrained import empty_model

_PREFIX = "base_model.model."


def export_adapter(source: FineTunedCheckpoint, output: str | PathLike[str]) -> ExportReport:
    """Writes the adapters as a folder for ``PeftModel.from_pretrained``; ConfigError if some are missing."""
    model = _peft_model(source)
    from peft import get_peft_model_state_dict

    # peft maps the names in the model to those of an adapter file: it gets the names as values.
    names: dict[str, str] = get_peft_model_state_dict(
        model, {name: name for name in model.state_dict()}, save_embedding_layers=False
    )
    of_model = _peft_tensors(source.tensors(), model)
    tensors = {_PREFIX + name: tensor for name, tensor in of_model.items()}
    missing = [name.removeprefix(_PREFIX) for name in names.values() if name not in tensors]
    if missing:
        raise ConfigError(f"{source.folder} lacks weights of its adapter: {first_names(missing)}")
    adapter = {file_name: tensors[name].contiguous() for file_name, name in names.items()}
    num_bytes = sum(tensor.nbytes for tensor in adapter.values())
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = source.description.base_model, True
    with new_folder(output, num_bytes, source.hf_folder) as folder:
        source.copy_companions(folder, "generation_config.json")
        save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(folder)
    what = f"adapter of {source.description.base_model}"
    return ExportReport(Path(output), what, sum(map(Tensor.numel, adapter.values())), num_bytes)


def merged_tensors(source: FineTunedCheckpoint) -> dict[str, Tensor]:
    """The tensors of the plain model, adapters merged into it; a tied weight under one name or under both."""
    model = _peft_model(source)
    tensors = _peft_tensors(in_full(source.tensors()), model)
    check_tensors(model.get_base_model(), tensors, str(source.folder))
    model.get_base_model().load_state_dict(tensors, strict=False, assign=True)
    with warnings.catch_warnings():
        # Assigned one by one, tied weights look untied to peft. Whether they are is decided by the caller.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        merged: dict[str, Tensor] = model.merge_and_unload().state_dict()
    # What is still on the meta device is a tied weight's other name.
    return {name: tensor for name, tensor in merged.items() if not tensor.is_meta}


def merged_name(name: str) -> str:
    """The plain model's name for a weight of a module that peft has wrapped."""
    for wrapper in (".base_layer.", ".modules_to_save.default.", ".original_module."):
        name = name.replace(wrapper, ".")
    return name


def _peft_tensors(saved: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A checkpoint's tensors by their names within the peft model."""
    # It has a module trained as a whole, such as a new classifier, twice; the pipeline only as it is trained.
    tensors = dict(saved)
    for name in model.get_base_model().state_dict():
        plain = merged_name(name)
        if name not in saved and plain in saved:
            tensors[name] = saved[plain]
            tensors.pop(plain, None)
    return tensors


def _peft_model(source: FineTunedCheckpoint) -> Any:
    assert source.description.peft is not None, "it has adapters"
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("this checkpoint has adapters, which takes peft: pip install peft") from error
    model = empty_model(source.load_config(), source.description.architecture)
    settings = {**source.description.peft, "base_model_name_or_path": None}
    if source.description.unembedding is None:
        settings["modules_to_save"] = list(find_anatomy(model).end)  # new, and trained as a whole
    try:
        config: Any = PeftConfig.from_peft_type(**settings)  # type: ignore[no-untyped-call]
        return get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{source.hf_folder / DESCRIPTION_FILE}: peft: these adapters do not go with "
            f"{source.description.architecture}: {error}"
        ) from error
