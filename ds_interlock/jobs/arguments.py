"""Arguments of jobs: dataclasses, read from a command line by transformers' ``HfArgumentParser``."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NoReturn, TypeVar

from transformers import HfArgumentParser

from ds_interlock.errors import ConfigError


def argument(default: Any, text: str | None = None, **options: Any) -> Any:
    """A field of a dataclass of arguments: its default, its line in ``--help``, argparse's ``options``."""
    metadata = {"help": text, **options}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class RunArguments:
    """What every job takes; each sets defaults and adds groups. ConfigError if a value makes no sense."""

    _argument_group_name: ClassVar[str] = "run"
    _least: ClassVar[dict[str, int]] = {
        "max_steps": 1, "logging_steps": 1, "eval_steps": 0, "save_steps": 0, "seed": 0,
        "save_total_limit": 1,
    }  # fmt: skip
    _example_config: ClassVar[str] = "configs/interlock.json"

    num_stages: int | None = argument(None, "pipeline stages (default: one for each rank)")
    max_steps: int = argument(400, "optimizer steps (%(default)s)")
    eval_steps: int = argument(0, "0: only at the end (%(default)s)")
    save_steps: int = argument(0, "0: only at the end (%(default)s)")
    logging_steps: int = argument(10, "(%(default)s)")
    output_dir: str = argument("runs", "(%(default)s)")
    save_total_limit: int | None = argument(None, "newest checkpoints to keep (default: all)")
    resume_from_checkpoint: str | None = argument(
        None, 'a checkpoints/ folder, one checkpoint in it, or "auto": the newest in --output_dir, if any'
    )
    seed: int = argument(42, "of weights, order of data, dropout (%(default)s)")
    local_rank: int = argument(-1, "set by the launcher")
    deepspeed_config: str | None = argument(None, "the DeepSpeed config, which sets the mode", metavar="FILE")
    deepspeed: bool = argument(False, "accepted, as DeepSpeed's own scripts do; it is always on")

    def __post_init__(self) -> None:
        if self.deepspeed_config is None:
            example = f"the mode is set there, as in {self._example_config}"
            raise ConfigError(f"--deepspeed_config is needed: {example}")
        for name, least in self._least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} is {value}: expected at least {least}")


@dataclass(kw_only=True)
class CompilationArguments:
    """Whether torch compiles a stage's blocks, by the names of transformers' Trainer."""

    _argument_group_name: ClassVar[str] = "compilation"

    torch_compile: bool = argument(False, "compile each block with torch.compile")
    torch_compile_backend: str | None = argument(
        None, "as torch.compile takes it; implies --torch_compile (default: inductor)", metavar="NAME"
    )


Arguments = TypeVar("Arguments", bound=RunArguments)
Config = TypeVar("Config")


def parse_arguments(
    kind: type[Arguments], description: str | None, argv: list[str] | None = None
) -> Arguments:
    """The arguments of a command line; each base of ``kind`` is a group of them in ``--help``."""
    groups: Any = kind.__bases__
    parser = _Parser(groups, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in getattr(kind, "_may_be_empty", ()):
        parser._option_string_actions[f"--{name}"].nargs = "*"
    return kind(**vars(parser.parse_args(argv)))


def config_from(args: RunArguments, kind: type[Config], **values: Any) -> Config:
    """A dataclass with ``values`` and, besides, the arguments that have the names of its fields."""
    names = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names if hasattr(args, name)} | values)


class _Parser(HfArgumentParser):
    """Its errors are those of the job, which one rank reports."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all arguments)")
