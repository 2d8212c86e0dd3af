r"""Fine-tunes a Hugging Face model in stages; the DeepSpeed config says in which mode.

    deepspeed --num_gpus 4 launcher/finetune.py --deepspeed_config configs/finetune/interlock.json \
        --model HuggingFaceTB/SmolLM2-135M-Instruct --train_file train.jsonl --output_dir out

It writes to ``--output_dir``: ``hf/`` with the model as a plain Hugging Face folder (or ``adapter/`` with
LoRA adapters in peft's format), ``checkpoints/`` to resume from, ``metrics.json``, ``train_log.jsonl``, and
``timeline.svg`` with a typical batch. Without this repository's files:
``deepspeed --module ds_interlock.jobs.finetune``.
"""

import sys
from functools import partial

import torch
import torch.distributed as dist

import ds_interlock
from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.check import check_layers
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.finetune_data import encode, read_data
from ds_interlock.jobs.finetune_model import open_model, prepare
from ds_interlock.jobs.finetune_task import FinetuneTask
from ds_interlock.jobs.loop import Loop, Metrics
from ds_interlock.jobs.process import Config, in_turns, propagate_errors, run_command, start

_HIGH_LEARNING_RATE = 5e-4  # for weights that are trained already


def run(args: FinetuneArguments) -> Metrics:
    """Fine-tunes, and exports the model. To be called on every rank of a job.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        ConfigError, DataError, PlanError: If arguments, config, model, data or stages cannot be used.
    """
    job = start(args, partial(_complete_config, args=args))
    rate = job.config["optimizer"]["params"]["lr"]
    if rate > _HIGH_LEARNING_RATE and not args.lora_r and dist.get_rank() == 0:
        print(
            f"finetune: warning: the learning rate is {rate:g}; above {_HIGH_LEARNING_RATE:g} a pretrained "
            "model soon forgets what it knew: --learning_rate 5e-5 is usual when all weights train",
            file=sys.stderr,
        )
    records, classes = read_data(args, has_data=job.has_data)
    dtype = torch.bfloat16 if job.config.get("bf16", {}).get("enabled") else torch.float32
    pretrained = in_turns(lambda: open_model(args, dtype, classes))
    data, inputs = encode(args, records, pretrained)
    with propagate_errors():
        net, description = prepare(args, job, pretrained, inputs)
    engine, *_ = ds_interlock.initialize(model=net, config=job.config)
    if not args.skip_load_check:
        with propagate_errors():
            check_layers(engine, pretrained, args.seq_length, inputs)
    torch.manual_seed(args.seed + dist.get_rank())  # every stage and replica drops out other units
    return Loop(FinetuneTask(engine, args, data, pretrained, description), args, job).run()


main = partial(run_command, "finetune", FinetuneArguments, run, __doc__)


def _complete_config(config: Config, args: FinetuneArguments) -> Config:
    """The DeepSpeed config with what the arguments say of it; with a learning rate, which has no default."""
    if args.learning_rate is not None:
        optimizer = config.get("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
        params = {**optimizer.get("params", {}), "lr": args.learning_rate}
        config = {**config, "optimizer": {**optimizer, "params": params}}
    if args.report_to == "tensorboard":
        board = {"enabled": True, "output_path": args.output_dir, "job_name": "tensorboard"}
        config = {**config, "tensorboard": board}
    rate = config.get("optimizer", {}).get("params", {}).get("lr")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
        raise ConfigError(
            f"the learning rate is {'missing' if rate is None else repr(rate)}: give --learning_rate, such "
            "as 5e-5, or optimizer.params.lr in the DeepSpeed config"
        )
    return config


if __name__ == "__main__":
    main()
