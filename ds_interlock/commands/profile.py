"""``ds-interlock profile``: what each layer of a model costs on the device at hand."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_interlock.commands.terminal import add_command, at_least_one, print_progress
from ds_interlock.config import InterlockConfig, read_deepspeed
from ds_interlock.errors import ConfigError

if TYPE_CHECKING:
    import torch

DEFAULT_SEQ_LENGTH = 512
TRUST = "run code that comes with the model"

_PROFILE = """\
Times forward, input gradient, weight gradient and optimizer step of every layer of a Hugging Face causal
language model, an auxiliary head as CONFIG's "interlock.head" describes it, and the link between two
processes, on the device at hand. Weights are random: no checkpoint is loaded.

The precision ("bf16"), the size of a micro-batch and the optimizer are CONFIG's. On CPU the times are of
--threads threads: as many as a stage has in your job.
"""


def add_parser(commands: Any) -> None:
    """Adds ``profile`` to the subcommands."""
    summary = "time a model's layers on this device, for `plan --profile`"
    add = add_command(commands, "profile", run, summary=summary, description=_PROFILE).add_argument
    default = "(default: %(default)s)"
    add("config", metavar="CONFIG", help="DeepSpeed JSON config")
    add("--model", required=True, metavar="NAME_OR_PATH", help="Hugging Face model, or a folder of one")
    add("--trust-remote-code", "--trust_remote_code", action="store_true", help=TRUST)
    tokens = f"tokens of a sample {default}"
    add("--seq-length", type=at_least_one, default=DEFAULT_SEQ_LENGTH, metavar="T", help=tokens)
    add("--micro-batch-size", type=at_least_one, metavar="B", help="samples (default: CONFIG's, or 1)")
    rounds = f"rounds a time is the median of {default}"
    add("--rounds", type=at_least_one, default=5, metavar="N", help=rounds)
    add("--threads", type=at_least_one, default=1, metavar="N", help=f"on CPU {default}")
    add("-o", "--output", type=Path, default=Path("profile.json"), metavar="FILE")


def run(options: argparse.Namespace) -> int:
    """Measures and writes the profile."""
    contents = read_deepspeed(options.config)
    interlock = InterlockConfig.from_deepspeed(options.config)
    micro_batch_size = options.micro_batch_size or micro_batch_size_of(contents)
    print_progress("importing DeepSpeed")
    import torch
    from deepspeed.accelerator import get_accelerator

    from ds_interlock.hf.model.pretrained import empty_model, load_config
    from ds_interlock.hf.model.profile import measure_profile
    from ds_interlock.hf.model.surgery import Skeleton
    from ds_interlock.profiling.link import measure_link

    if get_accelerator().device_name() == "cpu":
        torch.set_num_threads(options.threads)
    config = load_config(options.model, trust_remote_code=options.trust_remote_code)
    dtype = torch.bfloat16 if contents.get("bf16", {}).get("enabled") else torch.float32
    # A model that cannot be cut is refused before anything is timed.
    Skeleton(empty_model(config, "causal", dtype))
    print_progress("link between two processes")
    width = config.get_text_config().hidden_size
    link = measure_link(micro_batch_size * options.seq_length * width * dtype.itemsize)
    profile = measure_profile(
        options.model,
        config,
        interlock.head,
        dtype=dtype,
        micro_batch_size=micro_batch_size,
        seq_length=options.seq_length,
        make_optimizer=lambda parameters: _optimizer(contents, parameters),
        num_rounds=options.rounds,
        link=link,
    )
    profile.save(options.output)
    stage = 1000 * sum(profile.layer_seconds)
    head = f"head {1000 * profile.head.seconds:.4g} ms"
    if any(profile.head.blocks):
        head += f" and {1000 * profile.head.block_seconds:.4g} ms for each of its blocks"
    where = f"{stage:.4g} ms a micro-batch, {head} ({profile.source})"
    print(f"{options.output}: {len(profile.layers)} layers, {where}")
    return 0


def micro_batch_size_of(contents: dict[str, Any]) -> int:
    """The config's ``train_micro_batch_size_per_gpu``, 1 if it says nothing."""
    value = contents.get("train_micro_batch_size_per_gpu", 1)
    if value == "auto":
        return 1
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"train_micro_batch_size_per_gpu: got {value!r}, expected a number of samples")
    return value


def _optimizer(contents: dict[str, Any], parameters: "list[torch.Tensor]") -> Any:
    """An optimizer of the configured kind from torch; AdamW for kinds that torch does not have."""
    import torch

    kind = str(contents.get("optimizer", {}).get("type", "AdamW"))
    known = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    return known.get(kind.lower(), torch.optim.AdamW)(parameters, lr=1e-6)
