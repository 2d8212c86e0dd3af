"""How long a batch takes on K devices, for every mode of an experiment.

    python -m experiments.batch_times transformer        # docs/experiments/transformer_batch_times.json

    layers, loss and heads             a real pipeline: K processes,         how long a batch of the
    of the model, timed in       ─►    the engine, and layers that     ─►    same work takes, for every
    one thread                         sleep in these proportions            mode and number of micro-batches
    (stage_profile.py)                 (stage_profile.py)                    (this file)

Whatever the number M of micro-batches, a batch is the same work: a micro-batch takes 1/M of its time. The
model's optimizer step and the size of its messages are left out; the engine's own time is included.

A mode with a schedule has a time for each phase. Sections that differ only in how heads learn share a
measurement. Modes with a model of their own are not timed. To be run on a machine that does nothing else.

Rivals are in the same file: asynchronous pipelines as real ones, global under torch's ZBV likewise (if there
are two layers for each stage), and global under ZB-H1, which no engine here runs, as the simulator has it.
"""

import argparse
import json
import shlex
import sys
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from tqdm import tqdm

from ds_interlock import InterlockConfig
from ds_interlock.errors import ConfigError, DataError
from ds_interlock.files import read_record, replace_text
from experiments import definition
from experiments.definition import Definition
from experiments.efficiency import ZERO_BUBBLE, phase_sections
from experiments.stage_profile import LEARNING_KEYS, Pipeline, TaskProfile, without_learning
from experiments.tasks import make_task
from measuring.command import command_parser, exit_status
from measuring.results import machine, table, versions
from measuring.results_file import RESULTS

_Phase = tuple[str, int | None, dict[str, Any]]
"""A mode, the step that a phase of it begins at (None: it has no others), the flow then in force."""


class ProfileOfStages(BaseModel, frozen=True):
    """The proportions of the stages' sleeps. The unit is the mean forward of a stage."""

    stage_bounds: tuple[int, ...]
    stages: tuple[dict[str, Any], ...]
    """In units: "forward", "input_gradient" and "weight_gradient" of a stage's layers, the final "loss" on
    the last stage, and "heads": for each auxiliary head of some mode, both its passes together."""
    unit_seconds: float
    """The unit on the machine that was profiled, for a whole batch of the experiment."""


class Row(BaseModel, frozen=True, allow_inf_nan=False):
    """A mode, or a phase of one, with M micro-batches."""

    mode: str
    phase: int | None
    """The step that the phase begins at; None if the mode has one phase only."""
    interlock: dict[str, Any]
    """The section, or what stands in its place: see ``Run.flow`` and ``ZERO_BUBBLE``."""
    micro_batches: int
    seconds: float | None
    """What a batch of sleeping stages took: M micro-batches with a mean forward of ``milliseconds``. None:
    it was not measured, and the relative time is what the simulator says."""
    relative_seconds: float
    """The same in units of the mean stage forward of a whole batch: of the same work whatever M."""
    predicted: float | None
    """What the simulator says, in the same unit; None for torch's schedules."""


class BatchTimes(BaseModel, frozen=True):
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
    if section.keys() & {"asynchronous", "zero_bubble"}:
        return tuple(section.items())
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
    parser = command_parser(__doc__)
    parser.add_argument("name", help=f"the experiment: {', '.join(definition.names())}")
    micro_batches = {"nargs": "+", "default": [1, 4, 8], "metavar": "M"}
    parser.add_argument("--micro_batches", type=int, **micro_batches, help="of a batch (1 4 8)")
    text = "mean sleep of a stage's forward (%(default)s)"
    parser.add_argument("--milliseconds", type=float, default=40.0, help=text)
    parser.add_argument("--output", type=Path, help=f"the file ({RESULTS}/NAME_batch_times.json)")
    args = parser.parse_args(argv)
    for name, value in (("micro_batches", min(args.micro_batches)), ("milliseconds", args.milliseconds)):
        if not value > 0:
            parser.error(f"--{name}: got {value:g}, expected more than 0")
    torch.set_num_threads(1)
    words = ["python", "-m", "experiments.batch_times", *(sys.argv[1:] if argv is None else argv)]
    return exit_status(partial(_measure, args, shlex.join(words)))


def _measure(args: argparse.Namespace, command: str) -> None:
    experiment = definition.load(args.name)
    run = experiment.runs(args.name)[0].model_copy(update={"model": experiment.model})
    profile = TaskProfile(make_task(run))
    how = profile, args.micro_batches, args.milliseconds / 1000
    rows = (*_rows(_phases(experiment), *how), *_zero_bubble_rows(*how))
    times = BatchTimes(
        experiment=args.name,
        milliseconds=args.milliseconds,
        command=command,
        machine=machine(),
        versions=versions(),
        profile=ProfileOfStages(
            stage_bounds=profile.model.stage_bounds,
            stages=_stages(profile),  # after the heads are timed for the rows
            unit_seconds=profile.unit_seconds * run.training.num_micro_batches,
        ),
        rows=rows,
    )
    output = args.output or RESULTS / f"{args.name}_batch_times.json"
    replace_text(output, times.model_dump_json(indent=1) + "\n")
    print(table([row.model_dump(exclude={"interlock"}) for row in times.rows]))


def _phases(experiment: Definition) -> list[_Phase]:
    """What to measure."""
    return [
        (name, step if "schedule" in mode.interlock else None, of_phase)
        for name, mode in experiment.modes.items()
        if not mode.model
        for step, of_phase in phase_sections(mode.flow)
    ]


def _rows(
    phases: Sequence[_Phase], profile: TaskProfile, micro_batches: Sequence[int], unit_seconds: float
) -> list[Row]:
    """Measures every pipeline among the phases once, one after the other."""
    model, bar = profile.model, tqdm(phases, unit="phase", disable=None)
    measured: dict[Hashable, tuple[Pipeline, dict[int, float]]] = {}
    rows: list[Row] = []
    for mode, from_step, section in bar:
        # With fewer micro-batches than stages, 2BW would need more than two versions of the weights.
        least = len(model.stage_bounds) - 1 if section == {"asynchronous": "2bw"} else 1
        if not (numbers := [m for m in micro_batches if m >= least]):
            continue
        key = _what_counts(section, model.stage_bounds)
        if key not in measured:
            pipeline = _pipeline(section, profile)
            measured[key] = pipeline, pipeline.seconds(numbers, unit_seconds)
        pipeline, seconds = measured[key]
        rows += [
            Row(
                mode=mode,
                phase=from_step,
                interlock=section,
                micro_batches=m,
                seconds=seconds[m],
                relative_seconds=seconds[m] / (m * unit_seconds),
                predicted=pipeline.predicted(m) / m,
            )
            for m in numbers
        ]
    return rows


def _pipeline(section: Mapping[str, Any], profile: TaskProfile) -> Pipeline:
    if "asynchronous" in section:
        return Pipeline.asynchronous(profile.model)
    config = _one_phase(section)
    return Pipeline(config, profile.model, profile.heads_of(config))


def _zero_bubble_rows(
    profile: TaskProfile, micro_batches: Sequence[int], unit_seconds: float
) -> Iterator[Row]:
    """Global mode under the schedules of ``ZERO_BUBBLE``."""
    model = profile.model
    zbv = model.zbv_seconds(micro_batches, unit_seconds)
    for (name, flow), m in product(ZERO_BUBBLE.items(), micro_batches):
        common = {"mode": name, "phase": None, "interlock": flow, "micro_batches": m}
        if flow["zero_bubble"] == "ZB-H1":
            units = model.zb_h1(m) / m
            yield Row(**common, seconds=None, relative_seconds=units, predicted=units)
        elif m in zbv:
            relative = zbv[m] / (m * unit_seconds)
            yield Row(**common, seconds=zbv[m], relative_seconds=relative, predicted=None)


def _stages(profile: TaskProfile) -> tuple[dict[str, Any], ...]:
    """See ``ProfileOfStages.stages``."""
    costs, bounds = profile.model.costs({}), profile.model.stage_bounds
    names = ("forward", "input_gradient", "weight_gradient")
    stages = [
        {**{name: getattr(costs, name)[number] for name in names}, "loss": 0.0, "heads": []}
        for number in range(len(bounds) - 1)
    ]
    stages[-1]["loss"] = profile.model.loss
    for (config, layer), units in profile.heads.items():
        head = {"after_layer": layer, "section": config.model_dump(exclude=LEARNING_KEYS), "units": units}
        stages[bisect_left(bounds, layer) - 1]["heads"].append(head)
    return tuple(stages)


if __name__ == "__main__":
    sys.exit(main())
