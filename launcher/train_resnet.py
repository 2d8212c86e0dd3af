"""Trains a ResNet on small images, in stages; the DeepSpeed config says in which mode.

    deepspeed --num_gpus 4 launcher/train_resnet.py --deepspeed_config configs/resnet/interlock.json

Without more arguments that is ResNet-20 on Fashion-MNIST (apt-get install dataset-fashion-mnist). What comes
of it lies in ``--output_dir``: ``checkpoints/`` to resume from, ``metrics.json`` with the error on the test
images, and ``timeline.svg`` with the last batch.

Unless the config has a scheduler, the learning rate is multiplied by 0.1 after half and after three quarters
of the steps.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from job import in_turns, resolve_auto, resume, start_process
from resnet_run import Run
from torch.optim.lr_scheduler import LambdaLR

import ds_interlock
from ds_interlock import InterlockConfig, InterlockEngine, InterlockPipelineModule
from ds_interlock.config import read_deepspeed
from ds_interlock.errors import ConfigError, DataError, PlanError
from ds_interlock.images.data import ImageData
from ds_interlock.images.sources import load_images
from ds_interlock.models.resnet import (
    HEAD_CHANNELS,
    ResNetConfig,
    classification_loss,
    resnet_heads,
    resnet_layers,
)


def main(argv: list[str] | None = None) -> InterlockEngine:
    """The story of a run; returns its engine, for those who go on."""
    args = parse_arguments(argv)
    config = resolve_auto(read_deepspeed(args.deepspeed_config), args.max_steps)
    interlock = InterlockConfig.from_deepspeed(config)
    check_heads(interlock)
    start_process(args)

    data = in_turns(args.local_rank, lambda: read_images(args))
    resnet = ResNetConfig(
        depth=args.depth,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        width=args.width,
        block=args.block,
        shortcut=args.shortcut,
        seed=args.seed,
    )
    net = build_pipeline(resnet, interlock, args.num_stages, args.head_channels)
    schedule = None if "scheduler" in config else step_schedule(args.max_steps)
    engine, *_ = ds_interlock.initialize(model=net, config=config, lr_scheduler=schedule)

    run = Run(engine, args, data)
    if args.resume_from_checkpoint:
        run.step = resume(engine, Path(args.resume_from_checkpoint))
    run.train()
    run.finish(interlock)
    dist.barrier()
    return engine


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; arguments have the names that those of ``train_lm.py`` have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("images")
    data.add_argument(
        "--dataset",
        default="fashion-mnist",
        help="fashion-mnist, cifar10, cifar100, or a name for datasets.load_dataset (%(default)s)",
    )
    data.add_argument("--dataset_config", help="name of the data set's configuration")
    data.add_argument("--data_dir", type=Path, help="folder of a data set's files (IDX; CIFAR: parquet)")
    data.add_argument("--max_train_samples", type=int, default=0, help="images; 0: all (%(default)s)")
    data.add_argument("--no_augment", action="store_true", help="no random crops and flips")

    model = parser.add_argument_group("model")
    model.add_argument("--depth", type=int, default=20, help="weighted layers: 20, 32, 56, 110 (%(default)s)")
    model.add_argument("--width", type=int, default=16, help="channels of the first group (%(default)s)")
    model.add_argument("--block", choices=("basic", "bottleneck"), default="basic", help="(%(default)s)")
    model.add_argument(
        "--shortcut", choices=("A", "B"), default="A", help="see models/resnet.py (%(default)s)"
    )
    model.add_argument(
        "--head_channels",
        type=int,
        nargs="*",
        default=list(HEAD_CHANNELS),
        help="of each convolution in an auxiliary head; none: pooling and a linear layer (128 64)",
    )
    model.add_argument("--num_stages", type=int, help="pipeline stages (default: one for each rank)")

    _add_run(parser.add_argument_group("run"))
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _add_run(run: argparse._ArgumentGroup) -> None:
    run.add_argument("--max_steps", type=int, default=1000, help="optimizer steps (%(default)s)")
    run.add_argument("--eval_steps", type=int, default=250, help="0: only at the end (%(default)s)")
    run.add_argument("--max_eval_samples", type=int, default=0, help="test images; 0: all (%(default)s)")
    run.add_argument("--save_steps", type=int, default=0, help="0: only at the end (%(default)s)")
    run.add_argument("--logging_steps", type=int, default=10, help="(%(default)s)")
    run.add_argument("--output_dir", default="runs/resnet", help="(%(default)s)")
    run.add_argument("--resume_from_checkpoint", help="a checkpoints/ folder, or one checkpoint in it")
    run.add_argument("--seed", type=int, default=42, help="of weights, order, crops, flips (%(default)s)")
    run.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.deepspeed_config is None:
        parser.error(
            "--deepspeed_config is needed: the mode is set there, as in configs/resnet/interlock.json"
        )
    for name in ("max_steps", "logging_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: expected at least 1")
    for name in ("eval_steps", "max_train_samples", "max_eval_samples", "save_steps", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} is {getattr(args, name)}: expected 0 or more")


def check_heads(interlock: InterlockConfig) -> None:
    """Refuses a type of head that would be ignored."""
    if interlock.head.type != "auto":
        raise ConfigError(
            f'interlock.head.type: "{interlock.head.type}" is for language models: leave it out, the heads '
            "of a ResNet are set with --head_channels"
        )


def read_images(args: argparse.Namespace) -> ImageData:
    """The images that the arguments ask for."""
    data = load_images(args.dataset, args.data_dir, args.dataset_config)
    return ImageData(
        data.train.first(args.max_train_samples or len(data.train)),
        data.test.first(args.max_eval_samples or len(data.test)),
        data.num_classes,
    )


def build_pipeline(
    resnet: ResNetConfig, interlock: InterlockConfig, num_stages: int, head_channels: list[int]
) -> InterlockPipelineModule:
    """The model, cut so that every stage has as many blocks as the others."""
    return InterlockPipelineModule(
        layers=resnet_layers(resnet),
        loss_fn=classification_loss,
        num_stages=num_stages,
        partition_method="type:Block" if num_stages <= resnet.num_blocks else "uniform",
        interlock=interlock,
        head=resnet_heads(resnet, head_channels),
    )


def step_schedule(max_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Multiplies every learning rate by 0.1 after half, and again after three quarters of the steps."""

    def factor(step: int) -> float:
        return 0.1 ** ((2 * step >= max_steps) + (4 * step >= 3 * max_steps))

    return lambda optimizer: LambdaLR(optimizer, factor)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, PlanError) as error:
        sys.exit(f"train_resnet: {error}")
