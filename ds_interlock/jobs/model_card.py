"""The model card of a fine-tuned model: what it was made of, and what came out; and its way to the hub."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from ds_interlock.errors import ConfigError
from ds_interlock.files import replace_text
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.reports import with_nulls

_PACKAGES = ("ds_interlock", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "peft")
MANIFEST = "run.json"  # beside the card


def write_card(
    folder: Path,
    args: FinetuneArguments,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """Writes ``README.md`` and ``run.json`` into the folder of an exported model.

    ``config`` is the DeepSpeed config as it was used, ``data`` describes the data, ``metrics`` the results.
    """
    manifest = {
        "versions": {"python": platform.python_version(), **_versions()},
        "arguments": asdict(args),
        "deepspeed_config": config,
        "data": data,
        "metrics": with_nulls(metrics),
    }
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    is_local = Path(args.model).exists()
    about = ModelCardData(
        base_model=None if is_local else args.model,
        datasets=[name for _, name in args.parts if name and not Path(name).exists()] or None,
        library_name="peft" if args.exports_adapter else "transformers",
        pipeline_tag="text-generation" if args.task == "causal" else "text-classification",
        tags=["ds_interlock"],
    )
    losses = {name: value for name, value in metrics.items() if "eval" in name}
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in losses.items() if value is not None)
    mode = config.get("interlock", {}).get("mode", "global")
    text = (
        f"---\n{about.to_yaml()}\n---\n\n# {folder.absolute().parent.name}\n\n"
        f"{Path(args.model).name if is_local else args.model}, fine-tuned with ds_interlock in mode {mode}, "
        f"seed {args.seed}. All versions, arguments, the DeepSpeed config, the data and all results are in "
        f"[{MANIFEST}]({MANIFEST}).\n\n| | |\n|---|---|\n{rows}\n"
    )
    ModelCard(text, ignore_metadata_errors=True).save(folder / "README.md")


def push(folder: Path, args: FinetuneArguments) -> str:
    """Uploads an exported model to the hub; returns its address. ConfigError if the hub refuses it."""
    api = HfApi()
    try:
        repo = api.create_repo(str(args.hub_model_id), private=args.hub_private_repo, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"--push_to_hub: {args.hub_model_id} cannot be written ({str(error).splitlines()[0]}); the model "
            f"is in {folder}"
        ) from error
    return str(repo)


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
