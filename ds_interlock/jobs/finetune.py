r"""Fine-tunes a Hugging Face model in stages; the DeepSpeed config says in which mode.

    deepspeed --num_gpus 4 launcher/finetune.py --deepspeed_config configs/finetune/interlock.json \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --train_file train.jsonl --output_dir out

It writes to ``--output_dir``: ``hf/`` with the model as a plain Hugging Face folder (or ``adapter/`` with
LoRA adapters in peft's format), ``checkpoints/`` to resume from, ``metrics.json``, ``train_log.jsonl``, and
``timeline.svg`` with a typical batch. Without this repository's files:
``deepspeed --module ds_interlock.jobs.finetune``.
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import ds_interlock
from ds_interlock import HeadConfig, InterlockPipelineModule
from ds_interlock.config.deepspeed import DEFAULT_RATES
from ds_interlock.config.faults import shown_as_json
from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.checkpoint import ModelDescription
from ds_interlock.hf.model.adapt import add_lora, freeze, lora_config, scale_learning_rates
from ds_interlock.hf.model.balance import default_bounds, describe, parse_bounds
from ds_interlock.hf.model.check import check_layers
from ds_interlock.hf.model.cut import Blueprint, End
from ds_interlock.hf.model.four_bits import FourBits
from ds_interlock.hf.model.pretrained import Pretrained, open_pretrained
from ds_interlock.jobs.data import read_data
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.finetune_data import encode
from ds_interlock.jobs.finetune_task import FinetuneTask
from ds_interlock.jobs.hugging_face import (
    build_language_model,
    check_seq_length,
    compile_blocks,
    describe_for_export,
)
from ds_interlock.jobs.loop import Loop, Metrics
from ds_interlock.jobs.process import (
    Config,
    Job,
    broadcast_from_rank_0,
    in_turns,
    propagate_errors,
    run_command,
    start,
)
from ds_interlock.models.lm import lm_loss

_OPTIMIZERS = {  # by transformers' names: those of torch, then those of bitsandbytes
    "adamw_torch": "AdamW",
    "adafactor": "Adafactor",
    "sgd": "SGD",
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
_HIGHEST_RATES = {"WarmupLR": "warmup_max_lr", "WarmupDecayLR": "warmup_max_lr", "OneCycle": "cycle_max_lr"}
"""Of schedulers that set the rate by themselves."""
_HIGH_LEARNING_RATE = 5e-4  # for weights that are trained already


def run(args: FinetuneArguments) -> Metrics:
    """Fine-tunes, and exports the model; returns the contents of ``metrics.json``.

    To be called on every rank of a job. ConfigError, DataError or PlanError if arguments, config, model, data
    or stages cannot be used.
    """
    job = start(args, partial(_complete_config, args=args))
    rate = job.config["optimizer"]["params"]["lr"]
    if rate > _HIGH_LEARNING_RATE and not args.lora_r and dist.get_rank() == 0:
        print(
            f"finetune: warning: the learning rate is {rate:g}; above {_HIGH_LEARNING_RATE:g} a pretrained "
            "model soon forgets what it knew: --learning_rate 5e-5 is usual when all weights train",
            file=sys.stderr,
        )
    opened = read_data(args, args.task, args.seed, args.max_eval_samples, has_data=job.has_data)
    classes = broadcast_from_rank_0(opened.parts[0].classes if opened and opened.parts else ())
    dtype = torch.bfloat16 if job.config.get("bf16", {}).get("enabled") else torch.float32
    pretrained = in_turns(lambda: open_model(args, dtype, classes))
    data, inputs = encode(args, opened, pretrained)
    del opened  # the text, which may be much
    with propagate_errors():
        net, description = prepare(args, job, pretrained, inputs)
    with propagate_errors():
        optimizer = _function_of(job.config["optimizer"])
    engine, *_ = ds_interlock.initialize(model=net, optimizer=optimizer, config=job.config)
    if not args.skip_load_check:
        with propagate_errors():
            check_layers(engine, pretrained, args.seq_length, inputs)
    torch.manual_seed(args.seed + dist.get_rank())  # every stage and replica drops out other units
    return Loop(FinetuneTask(engine, args, data, pretrained, description, job.config), args, job).run()


main = partial(run_command, "finetune", FinetuneArguments, run, __doc__)


def _complete_config(config: Config, args: FinetuneArguments) -> Config:
    """The DeepSpeed config with what the arguments say of it; with a learning rate, which has no default."""
    if args.optim is not None:
        params = config.get("optimizer", {}).get("params", {})
        config = {**config, "optimizer": _optimizer(args.optim, params)}
    if args.learning_rate is not None:
        optimizer = config.get("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
        params = {**optimizer.get("params", {}), "lr": args.learning_rate}
        config = {**config, "optimizer": {**optimizer, "params": params}}
    if args.gradient_checkpointing:
        config = {**config, "pipeline": {**config.get("pipeline", {}), "activation_checkpoint_interval": 1}}
    if args.report_to == "tensorboard":
        board = {"enabled": True, "output_path": args.output_dir, "job_name": "tensorboard"}
        config = {**config, "tensorboard": board}
    rate = config.get("optimizer", {}).get("params", {}).get("lr")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
        raise ConfigError(
            f"the learning rate is {'missing' if rate is None else repr(rate)}: give --learning_rate, such "
            "as 5e-5, or optimizer.params.lr in the DeepSpeed config"
        )
    scheduler = config.get("scheduler", {})
    kind = scheduler.get("type", "")
    key = _HIGHEST_RATES.get(kind, "")
    params = DEFAULT_RATES.get(kind, {}) | scheduler.get("params", {})
    if args.learning_rate is not None and params.get(key, rate) not in ("auto", rate):
        raise ConfigError(
            f"--learning_rate is {rate:g}, and scheduler.params.{key} of the config, which decides, is "
            f"{params[key]}: give the same rate in both"
        )
    return config


def _optimizer(name: str, params: Config) -> Config:
    """The config's section of an optimizer, with those of ``params`` that it takes."""
    kind = _OPTIMIZERS[name]
    names = ("lr", "weight_decay", "betas", "eps") if "Adam" in kind else ("lr", "weight_decay")
    own = {"torch_adam": True} if kind == "AdamW" else {}
    return {"type": kind, "params": {**{key: params[key] for key in names if key in params}, **own}}


def _function_of(optimizer: Config) -> Any:
    """What makes an optimizer of bitsandbytes; None if DeepSpeed makes it by itself."""
    kind = optimizer.get("type", "")
    if "8bit" not in kind:
        return None
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ConfigError(f"--optim: {kind} needs bitsandbytes: pip install bitsandbytes") from error
    return partial(getattr(optim, kind), **optimizer["params"])


def open_model(args: FinetuneArguments, dtype: torch.dtype, classes: tuple[str, ...]) -> Pretrained:
    """The model's files; it must have room for the sequences."""
    how: Any = {"text_model_only": args.text_model_only, "trust_remote_code": args.trust_remote_code}
    pretrained = open_pretrained(
        args.model,
        args.task,
        gguf_file=args.gguf_file,
        dtype=dtype,
        classes=classes,
        attn_implementation=args.attn_implementation,
        seed=args.seed,
        **how,
    )
    if args.output_router_logits:
        pretrained.config.output_router_logits = True
    check_seq_length(pretrained, args.seq_length)
    if not args.load_in_4bit:
        return pretrained
    return replace(pretrained, four_bits=FourBits(args.bnb_4bit_quant_type, args.use_bnb_nested_quant))


def prepare(
    args: FinetuneArguments, job: Job, pretrained: Pretrained, inputs: tuple[str, ...]
) -> tuple[InterlockPipelineModule, ModelDescription]:
    """The model with its adapters and frozen weights, cut into stages; and its description for export."""
    if args.streaming and job.interlock.head.needs_base:
        objective = shown_as_json(job.interlock.head.objective)
        raise ConfigError(
            f"--streaming: interlock.head.objective {objective} records the base model's states of all "
            'training samples before the first step; set it to "cross_entropy", or leave out --streaming'
        )
    blueprint = pretrained.blueprint(inputs, tie=args.lora_r == 0)
    if args.output_router_logits and blueprint.routing is None:
        raise ConfigError(
            f"--output_router_logits: transformers adds no balance of experts to the loss of {args.model}, a "
            f"{type(blueprint.skeleton.model).__name__}: leave the flag out"
        )
    adapters = _adapt(blueprint, args)
    if args.stage_bounds:
        bounds = parse_bounds(args.stage_bounds)
    else:
        bounds = default_bounds(blueprint, job.interlock, job.num_stages)
    if dist.get_rank() == 0:
        print(describe(blueprint, bounds))
    how: dict[str, Any] = {"pretrained": True, "base_seed": args.seed}
    if args.task == "classification":
        _check_classifier_heads(job.interlock.head)
        how |= {"head": lambda _: End(blueprint), "stage_bounds": bounds}
        net = job.build_pipeline(blueprint.layers(), loss_fn=lm_loss(), **how)
    else:
        net = build_language_model(job, blueprint, bounds, **how)
    compile_blocks(net.forward_funcs, args, blueprint.routing)
    return net, describe_for_export(pretrained, blueprint, adapters)


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
    if head.needs_base:
        raise ConfigError(
            f"interlock.head.objective is {shown_as_json(head.objective)}: the heads of a classifier learn "
            'from the labels alone; set it to "cross_entropy" with --task classification'
        )


def _parse_scale(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        return pattern, float(factor)
    except ValueError:
        raise ConfigError(f"--learning_rate_scale {text}: expected REGEX=FACTOR, as embed=0.1") from None


if __name__ == "__main__":
    main()
