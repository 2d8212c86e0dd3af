"""``ds-interlock export``: a trained model as a Hugging Face folder."""

import argparse
import re
from typing import Any

from ds_interlock.commands.terminal import add_command, at_least_one, print_progress
from ds_interlock.errors import ConfigError

_DTYPES = ("float32", "bfloat16", "float16")

_EXPORT = """\
Writes a model that finetune or train_lm trained as a folder that transformers loads: safetensors,
configuration, generation configuration and tokenizer, without the auxiliary heads. Of a model with
adapters (LoRA) the adapters alone are written, in peft's format.

With --stages N, writes a smaller model of the same architecture instead: the blocks before an
auxiliary head in stage N - 1, and that head, as a draft for speculative decoding or an early exit.

OUT appears when it is complete; a model that was there is replaced only then.
"""


def add_parser(commands: Any) -> None:
    """Adds ``export`` to the subcommands."""
    summary = "write a trained model as a Hugging Face folder"
    add = add_command(commands, "export", run, summary=summary, description=_EXPORT).add_argument
    where = "folder of one checkpoint (.../global_step100), or the one above it for the latest"
    add("checkpoint", metavar="CHECKPOINT", help=where)
    add("output", metavar="OUT", help="folder to write")
    add("--stages", type=at_least_one, metavar="N", help="export the first N stages with a head of theirs")
    add(
        "--head",
        type=_index,
        metavar="I",
        help="index of its loss in the plan, from 0 (default: the last one in stage N - 1)",
    )
    add("--heads", action="store_true", help="write the heads too, to heads.safetensors")
    add("--merge_adapter", action="store_true", help="merge adapters into the model")
    add("--dtype", choices=_DTYPES, help="of the weights written (default: as trained)")
    add("--trust_remote_code", action="store_true", help="run code that came with the model")
    size = "split larger files (default: %(default)s)"
    add("--max_shard_size", type=_size, default="5GB", metavar="SIZE", help=size)


def run(options: argparse.Namespace) -> int:
    """Exports, and says what was written."""
    if options.head is not None and options.stages is None:
        raise ConfigError("--head says which head a smaller model ends in: it needs --stages")
    if options.heads and options.stages is not None:
        raise ConfigError("--heads writes the heads beside the whole model: leave it or --stages out")
    print_progress("importing transformers")
    import torch

    from ds_interlock.hf.export.draft import export_draft
    from ds_interlock.hf.export.model import export_model

    print_progress(f"writing {options.output}")
    paths = options.checkpoint, options.output
    dtype = getattr(torch, options.dtype) if options.dtype else None
    trust = options.trust_remote_code
    form: Any = {"dtype": dtype, "max_shard_size": options.max_shard_size, "trust_remote_code": trust}
    if options.stages is not None:
        report = export_draft(*paths, options.stages, options.head, **form)
    else:
        report = export_model(*paths, heads=options.heads, merge_adapter=options.merge_adapter, **form)
    print(report)
    return 0


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected the number of a head, from 0")
    return int(text)


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text.upper()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size such as 5GB or 200MB")
    return text
