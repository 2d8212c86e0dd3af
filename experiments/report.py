"""Writes docs/results.md and its pictures from the results files of the experiments.

    python -m experiments.report                                  # docs/experiments -> docs/results.md
    python -m experiments.report --results runs/mine --output runs/mine/results.md

Of every experiment in experiments/definitions the folder may have NAME.jsonl, written by experiments.run, and
NAME_batch_times.json, written by experiments.batch_times. All numbers come from these files; the same files
give the same page and pictures, byte for byte.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.results import markdown
from ds_interlock.errors import ConfigError, DataError
from ds_interlock.files import replace_text
from experiments import batch_times, comparison, definition
from experiments.comparison import Comparison, Result
from experiments.efficiency import Efficiency
from experiments.report_sections import Experiment, section
from experiments.report_tables import NOTHING, cell, digits_of, percent, unit_of
from experiments.run import RESULTS

OUTPUT = Path("docs/results.md")

_WINDOWS = ("window 2", "window 3")
"""The modes that the summary has of the claim on quality."""
_MICRO_BATCHES = (1, 4)
"""Of a batch, in what the summary has of the claim on time."""

_TITLE = "# Results: quality and time of interlocking, beside global and local"
_INTRODUCTION = """\
Interlocking backpropagation is to learn better than local learning, and to reach global's loss sooner than
global does. Here is what comes out. This page is made from the files in `{results}`; to make them again:

```
python -m experiments.run NAME --jobs 2      # the runs of {names}
python -m experiments.batch_times NAME       # batch times of as many processes as stages; on a quiet machine
python -m experiments.report                 # this page
```"""
_SUMMARY_NOTE = """\
Window 2 minus local: difference in points of test error or nats, below 0 is better for window 2, and the
same in spreads, that is in standard deviations over the seeds of that difference. M is the number of
micro-batches of a batch. A speed-up is given for the mode in brackets, which has the largest of those
that reach global's loss in every seed."""
_METHOD = """\
## How it is measured

**Quality.** All modes of a seed start from the same weights, and see the same batches in the same
order, as many as the budget has. The learning rate is constant, and the model that is scored has the
polynomially weighted average of the weights so far, about those of the last ninth of the steps
(`experiments/averaging.py`). Numbers are means over the seeds ± sample standard deviation. The gap
recovered is (local - mode) / (local - global), of each seed by itself; of the test error for images, of
the validation loss for text.

**Time.** What K devices would take is a product of two measurements: steps, from the curves of the runs
here, which train all stages in one process with the numbers that the pipeline has; and the time of a
batch, from pipelines of K real processes that run each mode with stages, heads and relays that sleep
for as long as a profile of this model says (`experiments/batch_times.py`), in a batch of the same work
whatever M is. Because of the averaged weights a curve holds at each step what a budget of so many steps
would have given, up to the warm-up of the learning rate, so that it can be read at any time. The target
of a seed is the loss on global's curve at the end of the budget; a mode needs the steps at which its
own curve of that seed is first there, linear between evaluations; global is held to the same rule. The
speed-up is global's steps times the time of its batch over the mode's steps times the time of its
batch; modes whose windows change add up their phases. A mode that does not get there in one of the
seeds has no speed-up. The start of the pipeline and its end are left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files (%(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help="the page; pictures go to a folder beside it (%(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        write(args.results, args.output)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.output)
    return 0


def write(results: Path, output: Path) -> None:
    """Writes the page and its pictures.

    Raises:
        ConfigError: If an experiment's definition is faulty.
        DataError: If there are no results, or a file of results cannot be used.
    """
    names = [*definition.names(), *map(definition.smoke_name, definition.names())]
    experiments = [_load(results, name, output) for name in names if (results / f"{name}.jsonl").exists()]
    if not experiments:
        raise DataError(
            f"{results} has no results of any experiment ({', '.join(definition.names())}): make them with "
            "`python -m experiments.run NAME`, or say with --results where they are"
        )
    parts = [
        _TITLE,
        _INTRODUCTION.format(
            results=os.path.relpath(results, output.parent),
            names=", ".join(f"`{experiment.name}`" for experiment in experiments),
        ),
        _machines(experiments),
        "## Summary",
        _summary(experiments),
        _METHOD,
        *(section(experiment, output.with_suffix("")) for experiment in experiments),
    ]
    replace_text(output, "\n\n".join(parts) + "\n")


def _load(results: Path, name: str, output: Path) -> Experiment:
    file = results / f"{name}.jsonl"
    found = definition.load(name)
    runs = comparison.read(file, order=list(found.modes))
    return Experiment(found, runs, _efficiency(runs, results), os.path.relpath(file, output.parent))


def _efficiency(runs: Comparison, results: Path) -> Efficiency | None:
    file = results / f"{runs.name}_batch_times.json"
    if not file.exists():
        return None
    times = batch_times.read(file)
    numbers = (row.micro_batches for row in times.rows)
    return Efficiency.of(runs, numbers, partial(batch_times.batch_seconds, times))


def _machines(experiments: Sequence[Experiment]) -> str:
    """Where the runs were made, a line for each machine and set of versions."""
    names: dict[str, list[str]] = {}
    for experiment in experiments:
        for result in experiment.comparison.all:
            on_it = names.setdefault(_machine(result), [])
            if experiment.name not in on_it:
                on_it.append(experiment.name)
    return "\n".join(f"- {', '.join(on_it)}: {machine}." for machine, on_it in names.items())


def _machine(result: Result) -> str:
    machine, versions = result.record["machine"], result.record["versions"]
    place = machine["gpu"] if result.record["device"] != "cpu" else "one core a run"
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    return (
        f"{machine['processor']}, {machine['num_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}; {place}; {packages}"
    )


def _summary(experiments: Sequence[Experiment]) -> str:
    header = ["experiment", "window 2 minus local", "in spreads"]
    recovered = [f"gap recovered by {mode}" for mode in _WINDOWS]
    speed_ups = [f"best time-to-loss speed-up, M = {m}" for m in _MICRO_BATCHES]
    table = markdown(
        [*header, *recovered, *speed_ups], [_summary_row(experiment) for experiment in experiments]
    )
    return f"{table}\n\n{_SUMMARY_NOTE}"


def _summary_row(experiment: Experiment) -> list[str]:
    runs = experiment.comparison
    gain = runs.gain_over_local(_WINDOWS[0])
    difference = f"{cell(gain, digits_of(runs), signed=True)} {unit_of(runs)}" if gain else NOTHING
    spreads = f"{gain.mean / gain.deviation:+.1f}" if gain and gain.deviation else NOTHING
    recovered = [percent(runs.recovered(mode)) for mode in _WINDOWS]
    return [
        experiment.name,
        difference,
        spreads,
        *recovered,
        *(_best(experiment.efficiency, m) for m in _MICRO_BATCHES),
    ]


def _best(efficiency: Efficiency | None, num_micro_batches: int) -> str:
    """The mode that is at global's loss first, of those with windows."""
    if efficiency is None or num_micro_batches not in efficiency.micro_batches:
        return "not measured"
    modes = [mode for mode in efficiency.modes if not efficiency.comparison.is_global(mode)]
    gains = {mode: efficiency.speed_up(mode, num_micro_batches) for mode in modes}
    reached = {mode: gain for mode, gain in gains.items() if gain}
    if not reached:
        return "none gets there"
    mode = max(reached, key=lambda name: reached[name].mean)
    return f"{cell(reached[mode], 2)} ({mode})"


if __name__ == "__main__":
    sys.exit(main())
