"""How the process of a job begins, what its errors do, and how it resumes."""

import io
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator

import ds_interlock
from ds_interlock import InterlockPipelineModule
from ds_interlock.config import InterlockConfig, check_deepspeed, check_filled_in, read_deepspeed
from ds_interlock.errors import ConfigError, DataError, NonfiniteError, PeerError, PlanError
from ds_interlock.jobs.arguments import Arguments, RunArguments, parse_arguments
from ds_interlock.jobs.orphans import end_with_launcher
from ds_interlock.transport import agreement
from ds_interlock.transport.failures import CollectiveLimits
from ds_interlock.transport.start import LONG, backend_of, control_group

_WARMUP_SHARE = 0.1  # of the steps, where the config's scheduler says "auto"

Result = TypeVar("Result")
Config = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a process knows of its job once it has joined it."""

    config: Config
    interlock: InterlockConfig
    num_stages: int

    @property
    def mode(self) -> str:
        """The mode, and the window if it has one."""
        window = f", window {self.interlock.window:g}" if self.interlock.window else ""
        return f"mode {self.interlock.mode_name}{window}"

    @property
    def has_data(self) -> bool:
        """Whether this rank is one of stage 0: DeepSpeed numbers the ranks stage by stage."""
        return dist.get_rank() < dist.get_world_size() // self.num_stages

    def build_pipeline(self, layers: Sequence[Any], **options: Any) -> InterlockPipelineModule:
        """The layers in stages, without what DeepSpeed prints of its topology and each layer."""
        options |= {"num_stages": self.num_stages, "interlock": self.interlock}
        with redirect_stdout(io.StringIO()):
            return InterlockPipelineModule(layers, **options)


def run_command(
    name: str,
    kind: type[Arguments],
    run: Callable[[Arguments], object],
    description: str | None,
    argv: list[str] | None = None,
) -> None:
    """The ``main`` of a job: reads the command line and runs; wrong input ends it with one sentence."""
    try:
        args: Arguments | ConfigError = parse_arguments(kind, description, argv)
    except ConfigError as error:
        args = error  # raised when all ranks can hear of it
    try:
        join_job(None if isinstance(args, ConfigError) else args.deepspeed_config)
        with propagate_errors():
            if isinstance(args, ConfigError):
                raise args
        run(args)
    except (ConfigError, DataError, PlanError, NonfiniteError, PeerError) as error:
        sys.exit(". ".join([f"{name}: {error}", *getattr(error, "__notes__", ())]))


def start(args: RunArguments, complete: Callable[[Config], Config] = lambda config: config) -> Job:
    """Joins the process group and reads the DeepSpeed config, which ``complete`` adds to."""
    if not join_job(args.deepspeed_config):
        raise ConfigError(f"start this through the launcher: deepspeed --num_gpus 4 {' '.join(sys.argv)}")
    transformers.utils.logging.disable_progress_bar()
    world_size = dist.get_world_size()
    num_stages = world_size if args.num_stages is None else args.num_stages
    with propagate_errors():
        config = _resolve_auto(complete(read_deepspeed(str(args.deepspeed_config))), args.max_steps)
        check_deepspeed(config)
        check_filled_in(config)
        interlock = InterlockConfig.from_deepspeed(config)
        if num_stages < 1 or world_size % num_stages:
            expected = f"a divisor of {world_size}, the number of processes"
            raise ConfigError(f"--num_stages is {num_stages}: expected {expected}")
    return Job(config, interlock, num_stages)


def join_job(deepspeed_config: str | None) -> bool:
    """Joins the process group, if a launcher has started this process; returns whether one has.

    The config says over which transport. One that cannot be read is for ``start`` to refuse.
    """
    if not {"RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        return False
    end_with_launcher()
    transport = "auto"
    with suppress(ConfigError):
        transport = InterlockConfig.from_deepspeed(deepspeed_config or {}).transport
    ds_interlock.init_distributed(dist_backend=backend_of(transport))
    if get_accelerator().device_name() == "cpu":
        torch.set_num_threads(1)  # the stages of a pipeline share the cores
    return True


def local_rank() -> int:
    """Number of this process on its machine; DeepSpeed sets the variable where a launcher has not."""
    return int(os.environ.get("LOCAL_RANK", 0))


def hide_progress_bars() -> None:
    """Those of the library ``datasets``, except where a person watches rank 0."""
    import datasets

    if dist.get_rank() or not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _resolve_auto(config: Config, max_steps: int) -> Config:
    """Fills in "auto" in the config's scheduler section, as Hugging Face's trainer does."""
    scheduler = config.get("scheduler", {})
    params = scheduler.get("params", {})
    values = {
        "total_num_steps": max_steps,
        "warmup_num_steps": max(1, round(_WARMUP_SHARE * max_steps)),
        "warmup_min_lr": 0.0,
        "warmup_max_lr": config.get("optimizer", {}).get("params", {}).get("lr"),
    }
    unknown = [key for key, value in params.items() if value == "auto" and values.get(key) is None]
    if unknown:
        raise ConfigError(
            f'scheduler.params.{unknown[0]} is "auto": only {", ".join(values)} can be filled in (the last '
            "one from optimizer.params.lr); give a value"
        )
    resolved = {key: values[key] if value == "auto" else value for key, value in params.items()}
    return {**config, "scheduler": {**scheduler, "params": resolved}} if scheduler else config


def in_turns(work: Callable[[], Result]) -> Result:
    """``work()`` on every rank; one process of a machine goes first, and the others read what it cached."""
    results = []
    for is_first_turn in (True, False):
        with propagate_errors():
            if (local_rank() == 0) == is_first_turn:
                results.append(work())
    return results[0]


def broadcast_from_rank_0(value: Result) -> Result:
    """Rank 0's ``value``, on every rank. All ranks must call it."""
    values = [value]
    with _patience():
        dist.broadcast_object_list(values, src=0, group=control_group())
    return values[0]


def gather(value: Result) -> list[Result]:
    """The values of all ranks. All ranks must call it, and may take long before they do."""
    with _patience():
        return agreement.gather(value)


def _patience() -> AbstractContextManager[None]:
    return CollectiveLimits().at(LONG.total_seconds())


@contextmanager
def propagate_errors() -> Iterator[None]:
    """Where the input is wrong, one rank raises the error, and the others exit silently.

    All ranks must enter it: those that cannot know of the error would wait for the one that left and then
    fail themselves, and an error that all see would be printed by each.
    """
    error = None
    try:
        yield
    except (ConfigError, DataError, PlanError) as raised:
        error = raised
    rank, failed = 0, [error is not None]
    if dist.is_initialized():
        rank, failed = dist.get_rank(), gather(error is not None)
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
        # torch.save reports a full disk with an error that is no OSError.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise ConfigError(
            f"--output_dir: {folder} cannot be written ({str(error).splitlines()[0]}): make room, or give "
            "another folder"
        ) from error


def resume(engine: Any, path: Path) -> int:
    """Loads the checkpoint ``path`` and returns the optimizer steps it had done. All ranks must call it."""
    is_parent = (path / "latest").is_file()
    folder, tag = (path, None) if is_parent else (path.parent, path.name)
    flag = f"--resume_from_checkpoint {path}"
    with propagate_errors():
        if not is_parent and not path.is_dir():
            raise ConfigError(f"{flag}: there is no checkpoint, and no file named latest")
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    with propagate_errors():  # of which all ranks have the same
        try:
            loaded, _ = engine.load_checkpoint(folder, tag=tag)
        except (RuntimeError, ConfigError) as error:
            message = str(error).removeprefix(f"{path}: ")
            fault, *for_scripts = re.split(r"[.:;] [Uu]se .*load_\w+", message)
            if message.startswith("Error(s) in loading state_dict"):
                fault = "its layers have other weights than this job's"
            elif not for_scripts:
                raise
            raise ConfigError(
                f"{flag}: {fault}: resume with the model, data, config and flags (--lora_r, --load_in_4bit, "
                "...) that it was saved with, or give another --output_dir"
            ) from error
    if loaded is None:
        raise ConfigError(f"{flag}: DeepSpeed finds no checkpoint there")
    if engine.lr_scheduler is None:  # the checkpoint has rates too, and this job may have been given others
        for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return int(engine.global_steps)


def peak_memory_bytes() -> list[int]:
    """The most memory each rank has used: of its device; on CPU of the process, with all its libraries."""
    if get_accelerator().device_name() != "cpu":
        return gather(get_accelerator().max_memory_allocated())
    return gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # it is in KiB
