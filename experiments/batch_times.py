"""How long a batch takes on K devices, for every mode of an experiment.

    python -m experiments.batch_times transformer        # docs/experiments/transformer_batch_times.json

    layers, loss and heads             a real pipeline: K processes,         how long a batch of the
    of the model, timed in       ─►    the engine, and layers that     ─►    same work takes, for every
    one thread                         sleep in these proportions            mode and number of micro-batches
    (stage_profile.py)                 (sleeping_pipeline.py)                (this file)

Whatever the number M of micro-batches, a batch is the same work: a micro-batch takes 1/M of its time. The
model's optimizer step and the size of its messages are left out; the engine's own time is included.

A mode with a schedule has a time for each phase. Sections that differ only in how heads learn share a
measurement. Modes with a model of their own are not timed. To be run on a machine that does nothing else.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from ds_interlock import InterlockConfig
from ds_interlock.errors import ConfigError, DataError
from ds_interlock.files import read_record, replace_text
from experiments import definition
from experiments.definition import GLOBAL, Definition
from experiments.efficiency import phase_sections
from experiments.sleeping_pipeline import Pipeline
from experiments.stage_profile import LEARNING_KEYS, TaskProfile, without_learning
from experiments.tasks import make_task
from measuring.results import machine, table, versions
from measuring.results_file import RESULTS

Section = dict[str, Any]
_Phase = tuple[str, int | None, Section]
"""A mode, the step that a phase of it begins at (None: it has no others), the section then in force."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProfileOfStages(_Record):
    """The proportions of the stages' sleeps. The unit is the mean forward of a stage."""

    stage_bounds: tuple[int, ...]
    stages: tuple[dict[str, Any], ...]
    """In units: "forward", "input_gradient" and "weight_gradient" of a stage's layers, the final "loss" on
    the last stage, and "heads": for each auxiliary head of some mode, both its passes together."""
    unit_seconds: float
    """The unit on the machine that was profiled, for a whole batch of the experiment."""


class Row(_Record):
    """A mode, or a phase of one, with M micro-batches."""

    mode: str
    phase: int | None
    """The step that the phase begins at; None if the mode has one phase only."""
    interlock: Section
    micro_batches: int
    seconds: float
    """What a batch of sleeping stages took: M micro-batches with a mean forward of ``milliseconds``."""
    relative_seconds: float
    """The same in units of the mean stage forward of a whole batch: of the same work whatever M."""
    predicted: float
    """What the simulator says, in the same unit."""
    floor: float
    """No bubble, no extra work: the slowest stage's own passes, in the same unit."""
    times_global: float
    """Speed: global's time with as many micro-batches, over this one."""


class BatchTimes(_Record):
    """The contents of the file."""

    format: Literal[1] = 1
    """To be raised when a reader of the old format would be misled; old files are then refused."""
    experiment: str
    milliseconds: float
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    profile: ProfileOfStages
    rows: tuple[Row, ...]


def read(path: Path) -> BatchTimes:
    """The batch times in a file.

    Raises:
        ConfigError: If there is no such file, or it is not one of batch times, or of another version.
    """
    hint = "measure batch times with `python -m experiments.batch_times NAME`"
    return read_record(path, BatchTimes, what="file of batch times", hint=hint)


def batch_seconds(times: BatchTimes, section: Mapping[str, Any], micro_batches: int) -> float:
    """What a batch of the experiment takes with one device per stage, at the speed that was profiled.

    Raises:
        ConfigError: If ``section`` has phases (``phase_sections`` has a section for each).
        DataError: If this was not measured.
    """
    bounds = times.profile.stage_bounds
    key = _what_counts(section, bounds)
    for row in times.rows:
        if row.micro_batches == micro_batches and key == _what_counts(row.interlock, bounds):
            return row.relative_seconds * times.profile.unit_seconds
    raise DataError(
        f"no batch time of {json.dumps(dict(section))} with {micro_batches} micro-batches: measure it with "
        f"`python -m experiments.batch_times {times.experiment} --micro_batches {micro_batches}`"
    )


def _what_counts(section: Mapping[str, Any], stage_bounds: Sequence[int]) -> Hashable:
    """All that the time of a batch depends on: equal for sections with equal times."""
    config = _one_phase(section)
    plan = config.plan(stage_bounds)
    streams = config.streams(plan, tied=False)
    return plan, streams, config.extra_in_flight, None if plan.is_end_to_end else config.head


def _one_phase(section: Mapping[str, Any]) -> InterlockConfig:
    """The section, checked, without the keys for how heads learn."""
    if "schedule" in section:
        raise ConfigError("interlock.schedule: batch times differ by phase; ask for one of phase_sections")
    config = InterlockConfig.from_deepspeed({"interlock": section})
    return config.model_copy(update={"head": without_learning(config.head)})


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the file and prints the table; the exit status."""
    args = _arguments(argv)
    torch.set_num_threads(1)
    try:
        experiment = definition.load(args.name)
        times = _measure(experiment, _phases(experiment, args.modes), args, argv)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    replace_text(args.output, times.model_dump_json(indent=1) + "\n")
    print(table([row.model_dump(exclude={"interlock"}) for row in times.rows]))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help=f"the experiment: {', '.join(definition.names())}")
    parser.add_argument(
        "--micro_batches", type=int, nargs="+", default=[1, 4, 8], metavar="M", help="of a batch (1 4 8)"
    )
    parser.add_argument(
        "--milliseconds", type=float, default=40.0, help="mean sleep of a stage's forward (%(default)s)"
    )
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="only these modes, and global (all)")
    parser.add_argument("--output", type=Path, help=f"the file ({RESULTS}/NAME_batch_times.json)")
    args = parser.parse_args(argv)
    for name, value in (("micro_batches", min(args.micro_batches)), ("milliseconds", args.milliseconds)):
        if not value > 0:
            parser.error(f"--{name}: got {value:g}, expected more than 0")
    args.output = args.output or RESULTS / f"{args.name}_batch_times.json"
    return args


def _phases(experiment: Definition, modes: Sequence[str] | None) -> list[_Phase]:
    """What to measure, global first."""
    definition.check_modes(modes, experiment.modes)
    own_model = [name for name, mode in experiment.modes.items() if mode.model]
    if impossible := [name for name in own_model if name in (modes or ())]:
        raise ConfigError(
            f"--modes: {', '.join(impossible)} has a model of its own, which is not timed; leave it out"
        )
    chosen = dict.fromkeys([GLOBAL, *(modes or (name for name in experiment.modes if name not in own_model))])
    sections = {name: experiment.modes[name].interlock for name in chosen}
    return [
        (name, step if "schedule" in section else None, of_phase)
        for name, section in sections.items()
        for step, of_phase in phase_sections(section)
    ]


def _measure(
    experiment: Definition, phases: Sequence[_Phase], args: argparse.Namespace, argv: Sequence[str] | None
) -> BatchTimes:
    run = next(run for run in experiment.runs(args.name) if run.mode == GLOBAL)
    profile = TaskProfile.measure(make_task(run.model_copy(update={"model": experiment.model})))
    words = sys.argv[1:] if argv is None else argv
    rows = _rows(phases, profile, args.micro_batches, args.milliseconds / 1000)
    return BatchTimes(
        experiment=args.name,
        milliseconds=args.milliseconds,
        command=shlex.join(["python", "-m", "experiments.batch_times", *words]),
        machine=machine(),
        versions=versions(),
        profile=ProfileOfStages(
            stage_bounds=profile.model.stage_bounds,
            stages=_stages(profile),
            unit_seconds=profile.unit_seconds * run.training.num_micro_batches,
        ),
        rows=tuple(rows),
    )


def _rows(
    phases: Sequence[_Phase], profile: TaskProfile, micro_batches: Sequence[int], unit_seconds: float
) -> list[Row]:
    """Measures every pipeline among the phases once, one after the other."""
    model = profile.model
    keys = [_what_counts(section, model.stage_bounds) for _, _, section in phases]
    configs = {key: _one_phase(section) for key, (_, _, section) in zip(keys, phases, strict=True)}
    pipelines = {key: Pipeline(config, model, profile.heads_of(config)) for key, config in configs.items()}
    bar = tqdm(pipelines.items(), unit="pipeline", disable=None)
    seconds = {key: pipeline.seconds(micro_batches, unit_seconds) for key, pipeline in bar}
    return [
        Row(
            mode=mode,
            phase=from_step,
            interlock=section,
            micro_batches=num,
            seconds=taken,
            relative_seconds=taken / (num * unit_seconds),
            predicted=pipelines[key].predicted(num) / num,
            floor=model.floor,
            times_global=seconds[keys[0]][num] / taken,
        )
        for key, (mode, from_step, section) in zip(keys, phases, strict=True)
        for num, taken in seconds[key].items()
    ]


def _stages(profile: TaskProfile) -> tuple[dict[str, Any], ...]:
    """See ``ProfileOfStages.stages``."""
    costs, bounds = profile.model.costs({}), list(pairwise(profile.model.stage_bounds))
    names = ("forward", "input_gradient", "weight_gradient")
    return tuple(
        {
            **{name: getattr(costs, name)[number] for name in names},
            "loss": profile.model.loss if number == len(bounds) - 1 else 0.0,
            "heads": [
                {"after_layer": layer, "section": config.model_dump(exclude=LEARNING_KEYS), "units": units}
                for (config, layer), units in profile.heads.items()
                if start < layer <= stop
            ],
        }
        for number, (start, stop) in enumerate(bounds)
    )


if __name__ == "__main__":
    sys.exit(main())
