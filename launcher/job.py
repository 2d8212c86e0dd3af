"""What the jobs in this folder share: how a process begins, what its errors do, how it resumes."""

import json
import math
import os
import resource
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ds_interlock
from ds_interlock.errors import ConfigError, DataError, PlanError
from ds_interlock.files import replace_text

_WARMUP_SHARE = 0.1  # of the steps, where the config's scheduler says "auto"
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK")

Result = TypeVar("Result")


def resolve_auto(config: dict[str, Any], max_steps: int) -> dict[str, Any]:
    """Fills in "auto" in the config's scheduler section, as Hugging Face's trainer does."""
    scheduler = config.get("scheduler", {})
    params = scheduler.get("params", {})
    learning_rate = config.get("optimizer", {}).get("params", {}).get("lr")
    values = {
        "total_num_steps": max_steps,
        "warmup_num_steps": max(1, round(_WARMUP_SHARE * max_steps)),
        "warmup_min_lr": 0.0,
        "warmup_max_lr": learning_rate,
    }
    unknown = [key for key, value in params.items() if value == "auto" and values.get(key) is None]
    if unknown:
        raise ConfigError(
            f'scheduler.params.{unknown[0]} is "auto": only {", ".join(values)} can be filled in (the last '
            "one from optimizer.params.lr); give a value"
        )
    resolved = {key: values[key] if value == "auto" else value for key, value in params.items()}
    return {**config, "scheduler": {**scheduler, "params": resolved}} if scheduler else config


def join_job() -> bool:
    """Joins the process group, if a launcher has started this process; says whether one has."""
    if not any(variable in os.environ for variable in _RANK_VARIABLES):
        return False
    ds_interlock.init_distributed()
    return True


def start_process(args: Namespace) -> None:
    """Joins the process group; checks and completes the arguments that depend on it."""
    if not join_job():
        raise ConfigError(f"start this through the launcher: deepspeed --num_gpus 4 {' '.join(sys.argv)}")
    args.local_rank = int(os.environ.get("LOCAL_RANK", max(args.local_rank, 0)))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        torch.set_num_threads(1)  # the stages of a pipeline share the cores
    else:
        accelerator.set_device(args.local_rank)
    world_size = dist.get_world_size()
    args.num_stages = world_size if args.num_stages is None else args.num_stages
    with errors_told_to_all():
        if args.num_stages < 1 or world_size % args.num_stages:
            raise ConfigError(
                f"--num_stages is {args.num_stages}: expected a divisor of {world_size}, the number of "
                "processes"
            )


def in_turns(local_rank: int, work: Callable[[], Result]) -> Result:
    """``work()`` on every rank; one process of a machine goes first, and the others find what it cached."""
    results = []
    for is_first_turn in (True, False):
        with errors_told_to_all():
            if (local_rank == 0) == is_first_turn:
                results.append(work())
    return results[0]


@contextmanager
def errors_told_to_all() -> Iterator[None]:
    """Where the input is wrong, one rank says so; the others leave without a word.

    All ranks must come here. Without it those that cannot know would wait for the one that left, and fail
    in their turn; and a fault that all of them see would be told by each. A process that no launcher has
    started is alone, and tells its own.
    """
    error = None
    try:
        yield
    except (ConfigError, DataError, PlanError) as raised:
        error = raised
    failed = [error is not None]
    rank = 0
    if dist.is_initialized():
        rank, failed = dist.get_rank(), [False] * dist.get_world_size()
        dist.all_gather_object(failed, error is not None)
    if error is not None and not any(failed[:rank]):
        raise error
    if any(failed):
        sys.exit(1)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within it results are written; a disk that is full or read-only is an error that the user can mend."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # What torch.save says of a full disk is no OSError.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise ConfigError(
            f"--output_dir: {folder} cannot be written ({str(error).splitlines()[0]}): make room, or give "
            "another folder"
        ) from error


def resume(engine: Any, path: Path) -> int:
    """Goes on where the checkpoint ``path`` was written; returns the optimizer steps it had done.

    Raises:
        ConfigError: If there is none.
    """
    is_parent = (path / "latest").is_file()
    folder, tag = (path, None) if is_parent else (path.parent, path.name)
    with errors_told_to_all():
        if not is_parent and not path.is_dir():
            raise ConfigError(
                f"--resume_from_checkpoint {path}: there is no checkpoint; nor a file named latest"
            )
    loaded, _ = engine.load_checkpoint(folder, tag=tag)
    if loaded is None:
        raise ConfigError(f"--resume_from_checkpoint {path}: DeepSpeed finds no checkpoint there")
    steps: int = engine.global_steps
    return steps


def stage_losses(engine: Any) -> dict[str, str]:
    """The newest loss of every stage with a head, for a progress bar."""
    losses = engine.stage_losses().items()  # by names such as "stage_1/loss_after_layer_6"
    return {name.partition("/")[0]: f"{x:.3f}" for name, x in losses if not name.endswith("/final_loss")}


def peak_memory_bytes() -> list[int]:
    """The most memory each rank has used: of its device; on CPU of the process, with all its libraries."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        own = accelerator.max_memory_allocated()
    peaks = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, own)
    return peaks


def is_due(step: int, every: int) -> bool:
    """Whether ``step`` is one of each ``every``; never if that is 0."""
    return every > 0 and step % every == 0


def report(step: int, loss: float, accuracy: float | None = None) -> str:
    """One line about an evaluation: of a language model, or of a classifier."""
    quality = f"perplexity {math.exp(loss):.2f}" if accuracy is None else f"accuracy {accuracy:.1%}"
    return f"step {step}: validation loss {loss:.4f}, {quality}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` so that the file is never seen half written; see ``with_nulls``."""
    replace_text(path, json.dumps(with_nulls(content), indent=2, allow_nan=False) + "\n")


def with_nulls(content: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinities, which JSON does not know, as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
