"""Checkpoints as launcher/finetune.py leaves them, made of whole models, without training anything."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ds_interlock.config import HeadConfig
from ds_interlock.engine.checkpoint import stage_state
from ds_interlock.heads.factory import head_factory
from ds_interlock.hf.export.checkpoint import DESCRIPTION_FILE, ModelDescription
from ds_interlock.hf.model.anatomy import find_anatomy
from ds_interlock.schedule.phases import PlanSchedule
from ds_interlock.schedule.plan import GradientFlowPlan


def layers_of(model: Any) -> list[tuple[str, ...]]:
    """Names of the modules in each pipeline layer: front, blocks, end, unembedding."""
    anatomy = find_anatomy(model)
    blocks = [(f"{anatomy.blocks}.{number}",) for number in range(anatomy.num_blocks)]
    behind = [anatomy.end] if anatomy.unembedding is None else [anatomy.end, (anatomy.unembedding,)]
    return [anatomy.front, *blocks, *behind]


def make_heads(
    model: Any, plan: GradientFlowPlan, tail: tuple[Any, ...] = (), seed: int = 3, **config: Any
) -> dict[int, Any]:
    """The auxiliary heads of ``plan`` as the pipeline builds them, then with weights as if trained."""
    anatomy = find_anatomy(model)
    ends = [model.get_submodule(path) for path in (*anatomy.end, anatomy.unembedding)]
    blocks = list(model.get_submodule(anatomy.blocks))
    make = head_factory(HeadConfig(**config), [nn.Identity(), *blocks, *ends, *tail], pretrained=True)
    torch.manual_seed(seed)
    heads = {loss: make(place).eval() for loss, place in enumerate(plan.heads[:-1])}
    with torch.no_grad():
        for head in heads.values():
            for parameter in head.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
    return heads


def write_checkpoint(
    folder: Path,
    model: Any,
    plan: GradientFlowPlan,
    heads: Mapping[int, nn.Module] | None = None,
    *,
    last_copy: Tensor | None = None,
    peft: dict[str, Any] | None = None,
    base_model: str = "base",
    tokenizer: Any = None,
) -> Path:
    """Writes ``folder/global_step7``, ``folder/latest`` and ``folder/hf``.

    Args:
        folder: The folder of checkpoints.
        model: The trained model, with adapters if ``peft`` is given.
        plan: Cuts it into stages.
        heads: By loss.
        last_copy: The last stage's own copy of the tied embedding.
        peft: The adapters' configuration as a dict.
        base_model: Its name.
        tokenizer: Saved with it.

    Returns:
        The folder of the checkpoint.
    """
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    anatomy = find_anatomy(model)
    layers = layers_of(model)
    tied = anatomy.tied and model.lm_head.weight is model.get_input_embeddings().weight
    for number, paths in enumerate(layers[:-1] if tied else layers):
        state = {
            f"{path}.{k}": v for path in paths for k, v in model.get_submodule(path).state_dict().items()
        }
        torch.save(state, step / f"layer_{number:02d}-model_states.pt")
    embedding = f"{anatomy.embedding}.weight"
    for stage in range(plan.num_stages):
        own = {loss: head for loss, head in (heads or {}).items() if plan.heads[loss].stage == stage}
        module = _module(own, plan)
        if last_copy is not None and stage in (0, plan.num_stages - 1):
            weight = last_copy if stage else model.get_submodule(anatomy.embedding).weight.detach()
            module.tied_modules = SimpleNamespace(state_dict={f"embedding.{embedding}": weight}.copy)
        torch.save(stage_state(module), step / f"interlock_stage_{stage:02d}.pt")
    _write_hf_folder(folder / "hf", model, anatomy, peft, base_model, tokenizer)
    return step


def _module(heads: Mapping[int, nn.Module], plan: GradientFlowPlan) -> Any:
    """What the writer of checkpoints uses of a pipeline module."""
    return SimpleNamespace(
        plan=plan,
        heads=nn.ModuleDict({str(loss): head for loss, head in heads.items()}),
        schedule=PlanSchedule.constant(plan),
        tied_comms={},
        copies=None,
        tied_modules=nn.ModuleDict(),
        micro_offset=0,
    )


def _write_hf_folder(
    folder: Path, model: Any, anatomy: Any, peft: dict[str, Any] | None, base_model: str, tokenizer: Any
) -> None:
    folder.mkdir()
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    norms = [path for path in anatomy.end if "norm" in path or path.endswith("ln_f")]
    description = ModelDescription(
        architecture=type(model).__name__,
        num_front_layers=1,
        num_blocks=anatomy.num_blocks,
        embedding=anatomy.embedding,
        norm=norms[0] if norms else None,
        unembedding=anatomy.unembedding,
        peft=peft,
        base_model=base_model,
    )
    (folder / DESCRIPTION_FILE).write_text(description.model_dump_json(indent=2))
