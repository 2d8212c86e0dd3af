"""What jobs that train a transformers model share: the pipeline of its layers, and what an export needs."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_interlock import HeadConfig, InterlockPipelineModule
from ds_interlock.checkpoints.folder import newest_first
from ds_interlock.errors import ConfigError
from ds_interlock.files import replace_text, unfinished_folder
from ds_interlock.hf.export.checkpoint import DESCRIPTION_FILE, HF_FOLDER, ModelDescription
from ds_interlock.hf.model.convert import copy_companions
from ds_interlock.hf.model.cut import Bias, Block, Blueprint
from ds_interlock.hf.model.pretrained import Pretrained, has_own_code
from ds_interlock.hf.model.routing import BalancedLMLoss
from ds_interlock.jobs.arguments import CompilationArguments
from ds_interlock.jobs.process import Job, propagate_errors, writing
from ds_interlock.models import lm
from ds_interlock.models.lm import lm_loss


def compile_blocks(layers: Sequence[Any], args: CompilationArguments, routing: object = None) -> None:
    """Has torch compile each block among a stage's layers, if ``args`` say so. Names of parameters stay.

    ConfigError if torch has no such backend, or ``routing``, the balance of experts, is learned.
    """
    if not (args.torch_compile or args.torch_compile_backend):
        return
    backend = args.torch_compile_backend or "inductor"
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"--torch_compile_backend {backend}: torch has {', '.join(sorted(known))}")
    if routing is not None:
        raise ConfigError(
            "--torch_compile: the experts' balance is read from their routers while a block runs, which a "
            "compiled block does not allow: leave it out, or set output_router_logits to false"
        )
    for layer in layers:
        if isinstance(layer, Block | lm.Block):
            # Of transformers' blocks only their own code: what prepares their arguments branches on values.
            parts = layer.parts().values() if isinstance(layer, Block) else [layer]
            for part in parts:
                part.compile(backend=backend)


def build_language_model(
    job: Job, blueprint: Blueprint, bounds: Sequence[int], *, label_smoothing: float = 0.0, **options: Any
) -> InterlockPipelineModule:
    """The layers in stages, with a language model's loss; ConfigError if no heads fit that are needed."""
    if not job.interlock.is_global:
        check_heads_fit(blueprint, job.interlock.head)
    loss_fn = lm_loss(label_smoothing)
    if blueprint.routing:
        loss_fn = BalancedLMLoss(blueprint.routing, label_smoothing)
    return job.build_pipeline(blueprint.layers(), loss_fn=loss_fn, stage_bounds=list(bounds), **options)


def check_heads_fit(blueprint: Blueprint, head: HeadConfig) -> None:
    """Raises ConfigError where no head can read the hidden state with the model's own unembedding."""
    skeleton = blueprint.skeleton
    assert skeleton.anatomy.unembedding is not None, "a language model has one"
    unembedding: Any = skeleton.original(skeleton.anatomy.unembedding)
    width = skeleton.model.config.get_text_config().hidden_size
    faults = {
        "its blocks pass on several hidden states at each position": not skeleton.anatomy.is_plain,
        "its unembedding has a bias beside its tied weight": any(
            isinstance(layer, Bias) for layer in blueprint.outline
        ),
        f"its hidden states have {width} entries and its unembedding takes {unembedding.in_features}": (
            unembedding.in_features != width
        ),
    }
    for fault in (fault for fault, is_so in faults.items() if is_so):
        raise ConfigError(
            f'--model: {fault}, so no auxiliary head can be made of it; use "interlock": {{"mode": "global"}}'
        )
    if head.blocks and any(skeleton.anatomy.beside):
        raise ConfigError(
            "interlock.head.blocks: the blocks of --model need more than a hidden state; leave it at 0"
        )


def check_seq_length(pretrained: Pretrained, seq_length: int, remedy: str = "") -> None:
    """Raises ConfigError, which ends in ``remedy``, if the model does not know so many positions."""
    positions = pretrained.num_positions()
    if positions is not None and seq_length > positions:
        raise ConfigError(
            f"--seq_length is {seq_length}, but {pretrained.name} knows {positions} positions (by its "
            f"max_position_embeddings): use at most that many{remedy}"
        )


def describe_for_export(
    pretrained: Pretrained, blueprint: Blueprint, adapters: Any = None
) -> ModelDescription:
    """What ``ds-interlock export`` must know; ``adapters`` is peft's configuration of them."""
    anatomy = blueprint.skeleton.anatomy
    return ModelDescription(
        architecture=type(blueprint.skeleton.model).__name__,
        num_front_layers=1,
        num_blocks=anatomy.num_blocks,
        embedding=anatomy.embedding,
        norm=next(iter(anatomy.end), None) if anatomy.unembedding else None,
        unembedding=anatomy.unembedding,
        peft=None if adapters is None else _without_sets(adapters.to_dict()),
        base_model=pretrained.name,
    )


def _without_sets(settings: dict[str, Any]) -> dict[str, Any]:
    """Lists in their place: the order of a set is another in each process."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def write_description(output: Path, pretrained: Pretrained, description: ModelDescription) -> None:
    """Writes ``checkpoints/hf/``: description, configuration, tokenizer. All ranks call it, rank 0 writes.

    If another one is there, the checkpoints beside it keep it, each in a folder ``hf/`` of its own.
    """
    with propagate_errors(), writing(output):
        if dist.get_rank() == 0:
            _write_description(output, pretrained, description)


def _write_description(output: Path, pretrained: Pretrained, description: ModelDescription) -> None:
    checkpoints, written = output / "checkpoints", output / "checkpoints" / HF_FOLDER
    with unfinished_folder(written) as folder:
        pretrained.config.save_pretrained(folder)
        pretrained.tokenizer.save_pretrained(folder)
        copy_companions(pretrained.folder, folder, own_code=has_own_code(pretrained.config))
        replace_text(folder / DESCRIPTION_FILE, description.model_dump_json(indent=2) + "\n")
        if not written.is_dir() or _contents(folder) == _contents(written):
            return
        for own in (checkpoint / HF_FOLDER for checkpoint in newest_first(checkpoints)):
            if not own.is_dir():
                with unfinished_folder(own) as copy:
                    shutil.copytree(written, copy, dirs_exist_ok=True)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
