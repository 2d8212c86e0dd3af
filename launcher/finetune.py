r"""Fine-tunes a Hugging Face model in stages; the DeepSpeed config says in which mode.

    deepspeed --num_gpus 4 launcher/finetune.py --deepspeed_config configs/finetune/interlock.json \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --train_file train.jsonl --output_dir out

What comes of it lies in ``--output_dir``: ``hf/`` with the model as a plain Hugging Face folder (or
``adapter/`` with LoRA adapters in peft's format), ``checkpoints/`` to resume from, ``metrics.json``,
``train_log.jsonl``, and ``timeline.svg`` with the last batch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetune_data
import torch
import torch.distributed as dist
from finetune_arguments import parse_arguments
from finetune_base import bring_base_states
from finetune_run import Run
from job import errors_told_to_all, in_turns, join_job, resolve_auto, resume, start_process

import ds_interlock
from ds_interlock import InterlockConfig, InterlockPipelineModule
from ds_interlock.config import check_deepspeed, read_deepspeed
from ds_interlock.errors import ConfigError, DataError, PlanError
from ds_interlock.hf.export.description import ModelDescription
from ds_interlock.hf.model.adapt import add_lora, freeze, lora_config, scale_learning_rates
from ds_interlock.hf.model.balance import default_bounds, describe, parse_bounds
from ds_interlock.hf.model.check import check_layers
from ds_interlock.hf.model.cut import Blueprint, End
from ds_interlock.hf.model.pretrained import Pretrained, open_pretrained
from ds_interlock.models.lm import lm_loss

_HIGH_LEARNING_RATE = 5e-4  # for weights that are trained already


def main(argv: list[str] | None = None) -> None:
    """The story of a run."""
    join_job()
    with errors_told_to_all():
        args = parse_arguments(__doc__, argv)
        config = resolve_auto(with_arguments(read_deepspeed(args.deepspeed_config), args), args.max_steps)
        check_deepspeed(config)
        check_learning_rate(config)
        interlock = InterlockConfig.from_deepspeed(config)
    start_process(args)
    warn_of_learning_rate(config, args)

    records = finetune_data.read(args)
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    pretrained = in_turns(args.local_rank, lambda: open_model(args, dtype, records.classes))
    data = finetune_data.encode(args, records, pretrained)
    with errors_told_to_all():
        job = prepare(args, pretrained, interlock, data.names)
    engine, *_ = ds_interlock.initialize(model=job.net, config=config)
    if not args.skip_load_check:
        with errors_told_to_all():
            check_layers(engine, pretrained, args.seq_length, data.names)
    torch.manual_seed(args.seed + dist.get_rank())  # every stage and replica drops out other units

    run = Run(engine, args, data, pretrained, job.description)
    if args.resume_from_checkpoint:
        run.step = resume(engine, Path(args.resume_from_checkpoint))
    bring_base_states(run)
    run.train()
    run.finish(interlock)
    engine.destroy()


def with_arguments(config: dict[str, Any], args: Any) -> dict[str, Any]:
    """The DeepSpeed config with what the command line says of it."""
    if args.learning_rate is not None:
        optimizer = config.get("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
        params = {**optimizer.get("params", {}), "lr": args.learning_rate}
        config = {**config, "optimizer": {**optimizer, "params": params}}
    if args.report_to == "tensorboard":
        board = {"enabled": True, "output_path": args.output_dir, "job_name": "tensorboard"}
        config = {**config, "tensorboard": board}
    return config


def check_learning_rate(config: dict[str, Any]) -> None:
    """Every optimizer has a learning rate of its own to start from, and none of them is meant.

    Raises:
        ConfigError: If neither the config nor the command line says one.
    """
    rate = config.get("optimizer", {}).get("params", {}).get("lr")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
        raise ConfigError(
            f"the learning rate is {'missing' if rate is None else repr(rate)}: give --learning_rate, such "
            "as 5e-5, or optimizer.params.lr in the DeepSpeed config"
        )


def warn_of_learning_rate(config: dict[str, Any], args: Any) -> None:
    """One line about a rate that suits a new model, or adapters."""
    rate = config["optimizer"]["params"]["lr"]
    if rate > _HIGH_LEARNING_RATE and not args.lora_r and dist.get_rank() == 0:
        print(
            f"finetune: warning: the learning rate is {rate:g}; above {_HIGH_LEARNING_RATE:g} a pretrained "
            "model soon forgets what it knew: --learning_rate 5e-5 is usual when all weights train",
            file=sys.stderr,
        )


def open_model(args: Any, dtype: torch.dtype, classes: tuple[str, ...]) -> Pretrained:
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


@dataclass(frozen=True)
class Job:
    """A pipeline ready to be trained, and what export must know of it."""

    net: InterlockPipelineModule
    description: ModelDescription


def prepare(args: Any, pretrained: Pretrained, interlock: InterlockConfig, inputs: tuple[str, ...]) -> Job:
    """Cuts the model, and says what of it trains."""
    blueprint = pretrained.blueprint(inputs, tie=args.lora_r == 0)
    adapters = None
    if args.lora_r:
        adapters = lora_config(
            blueprint,
            rank=args.lora_r,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=args.lora_target_modules,
        )
        blueprint.prepare.append(add_lora(adapters, args.seed))
    if args.freeze:
        blueprint.prepare.append(freeze(args.freeze, blueprint))
    if args.learning_rate_scale:
        scales = dict(map(_parse_scale, args.learning_rate_scale))
        blueprint.prepare.append(scale_learning_rates(scales, blueprint))
    bounds = (
        parse_bounds(args.stage_bounds)
        if args.stage_bounds
        else default_bounds(blueprint, interlock, args.num_stages)
    )
    if dist.get_rank() == 0:
        print(describe(blueprint, bounds))
    head = {}
    if args.task == "causal" and not interlock.is_global:
        check_heads_fit(blueprint)
    if args.task == "classification":
        if interlock.head.type != "auto":
            raise ConfigError(
                f'interlock.head.type is "{interlock.head.type}", which repeats the end of a language model: '
                'with --task classification use "auto", a copy of the classifier on every stage'
            )
        if interlock.head.kl_weight > 0:
            raise ConfigError(
                f"interlock.head.kl_weight is {interlock.head.kl_weight:g}: the heads of a classifier learn "
                "from the labels alone; set it to 0 with --task classification"
            )
        head["head"] = lambda _: End(blueprint)
    net = InterlockPipelineModule(
        layers=blueprint.layers(),
        loss_fn=lm_loss(),
        num_stages=args.num_stages,
        stage_bounds=bounds,
        interlock=interlock,
        pretrained=True,
        base_seed=args.seed,
        **head,
    )
    return Job(net, describe_for_export(pretrained, blueprint, adapters))


def check_heads_fit(blueprint: Blueprint) -> None:
    """Heads read the hidden state with the model's own unembedding, which must be as wide.

    Raises:
        ConfigError: If it is not.
    """
    assert blueprint.skeleton.anatomy.unembedding is not None, "a language model has one"
    unembedding: Any = blueprint.skeleton.original(blueprint.skeleton.anatomy.unembedding)
    width = blueprint.skeleton.model.config.get_text_config().hidden_size
    if unembedding.in_features != width:
        raise ConfigError(
            f"--model: its hidden states have {width} entries and its unembedding takes "
            f"{unembedding.in_features}, so no auxiliary head can be made of it; use "
            '"interlock": {"mode": "global"}'
        )


def describe_for_export(pretrained: Pretrained, blueprint: Blueprint, adapters: Any) -> ModelDescription:
    """What export must know of the model besides its Hugging Face files."""
    anatomy = blueprint.skeleton.anatomy
    is_language_model = anatomy.unembedding is not None
    return ModelDescription(
        architecture=type(blueprint.skeleton.model).__name__,
        num_front_layers=1,
        num_blocks=anatomy.num_blocks,
        blocks=anatomy.blocks,
        embedding=anatomy.embedding,
        norm=next(iter(anatomy.end), None) if is_language_model else None,
        unembedding=anatomy.unembedding,
        tied=anatomy.tied,
        peft=None if adapters is None else adapters.to_dict(),
        base_model=pretrained.name,
    )


def _parse_scale(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        return pattern, float(factor)
    except ValueError:
        raise ConfigError(f"--learning_rate_scale {text}: expected REGEX=FACTOR, as embed=0.1") from None


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, PlanError) as error:
        sys.exit(f"finetune: {error}")
