"""The model of ``finetune``: opened, adapted, cut into stages."""

from typing import Any

import torch
import torch.distributed as dist

from ds_interlock import HeadConfig, InterlockPipelineModule
from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.finetuned import ModelDescription
from ds_interlock.hf.model.adapt import add_lora, freeze, lora_config, scale_learning_rates
from ds_interlock.hf.model.balance import default_bounds, describe, parse_bounds
from ds_interlock.hf.model.cut import Blueprint, End
from ds_interlock.hf.model.pretrained import Pretrained, open_pretrained
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.process import Job
from ds_interlock.models.lm import lm_loss


def open_model(args: FinetuneArguments, dtype: torch.dtype, classes: tuple[str, ...]) -> Pretrained:
    """The model's files; it must have room for the sequences."""
    pretrained = open_pretrained(
        args.model, args.task, gguf_file=args.gguf_file, dtype=dtype, classes=classes
    )
    positions = pretrained.num_positions()
    if positions is not None and args.seq_length > positions:
        raise ConfigError(
            f"--seq_length is {args.seq_length}, but {args.model} knows {positions} positions (by its "
            "max_position_embeddings): use at most that many"
        )
    return pretrained


def prepare(
    args: FinetuneArguments, job: Job, pretrained: Pretrained, inputs: tuple[str, ...]
) -> tuple[InterlockPipelineModule, ModelDescription]:
    """The model with its adapters and frozen weights, cut into stages; and its description for export."""
    blueprint = pretrained.blueprint(inputs, tie=args.lora_r == 0)
    adapters = _adapt(blueprint, args)
    if args.stage_bounds:
        bounds = parse_bounds(args.stage_bounds)
    else:
        bounds = default_bounds(blueprint, job.interlock, job.num_stages)
    if dist.get_rank() == 0:
        print(describe(blueprint, bounds))
    head: dict[str, Any] = {}
    if args.task == "classification":
        _check_classifier_heads(job.interlock.head)
        head["head"] = lambda _: End(blueprint)
    elif not job.interlock.is_global:
        _check_heads_fit(blueprint)
    net = job.build_pipeline(
        blueprint.layers(),
        loss_fn=lm_loss(),
        stage_bounds=bounds,
        pretrained=True,
        base_seed=args.seed,
        **head,
    )
    return net, _describe_for_export(pretrained, blueprint, adapters)


def _adapt(blueprint: Blueprint, args: FinetuneArguments) -> Any:
    """Sets what trains, and how fast; returns the configuration of the LoRA adapters, None without any."""
    adapters = None
    if args.lora_r:
        sizes: Any = {"rank": args.lora_r, "alpha": args.lora_alpha, "dropout": args.lora_dropout}
        adapters = lora_config(blueprint, target_modules=args.lora_target_modules, **sizes)
        blueprint.prepare.append(add_lora(adapters, args.seed))
    if args.freeze:
        blueprint.prepare.append(freeze(args.freeze, blueprint))
    if args.learning_rate_scale:
        scales = dict(map(_parse_scale, args.learning_rate_scale))
        blueprint.prepare.append(scale_learning_rates(scales, blueprint))
    return adapters


def _check_classifier_heads(head: HeadConfig) -> None:
    if head.type != "auto":
        raise ConfigError(
            f'interlock.head.type is "{head.type}", which repeats the output layers of a language model: '
            'with --task classification use "auto", a copy of the classifier on every stage'
        )
    if head.kl_weight > 0:
        raise ConfigError(
            f"interlock.head.kl_weight is {head.kl_weight:g}: the heads of a classifier learn from the "
            "labels alone; set it to 0 with --task classification"
        )


def _check_heads_fit(blueprint: Blueprint) -> None:
    """Heads read the hidden state with the model's own unembedding, which must be as wide."""
    skeleton = blueprint.skeleton
    assert skeleton.anatomy.unembedding is not None, "a language model has one"
    unembedding: Any = skeleton.original(skeleton.anatomy.unembedding)
    width = skeleton.model.config.get_text_config().hidden_size
    if unembedding.in_features != width:
        raise ConfigError(
            f"--model: its hidden states have {width} entries and its unembedding takes "
            f"{unembedding.in_features}, so no auxiliary head can be made of it; use "
            '"interlock": {"mode": "global"}'
        )


def _describe_for_export(pretrained: Pretrained, blueprint: Blueprint, adapters: Any) -> ModelDescription:
    anatomy = blueprint.skeleton.anatomy
    return ModelDescription(
        architecture=type(blueprint.skeleton.model).__name__,
        num_front_layers=1,
        num_blocks=anatomy.num_blocks,
        embedding=anatomy.embedding,
        norm=next(iter(anatomy.end), None) if anatomy.unembedding else None,
        unembedding=anatomy.unembedding,
        peft=None if adapters is None else adapters.to_dict(),
        base_model=pretrained.name,
    )


def _parse_scale(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        return pattern, float(factor)
    except ValueError:
        raise ConfigError(f"--learning_rate_scale {text}: expected REGEX=FACTOR, as embed=0.1") from None
