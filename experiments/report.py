"""Writes docs/results.md and its pictures from the results files of the experiments.

    python -m experiments.report                                  # docs/experiments -> docs/results.md
    python -m experiments.report --results runs/mine --output runs/mine/results.md

Of every experiment in experiments/definitions the folder may have NAME.jsonl, written by experiments.run, and
NAME_batch_times.json, written by experiments.batch_times. All numbers come from these files; the same files
give the same page and pictures, byte for byte. The page's text is in report.md.jinja.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from ds_interlock.errors import ConfigError, DataError
from ds_interlock.files import replace_text
from experiments import batch_times, comparison, definition, figures, finetune, tables
from experiments.comparison import Comparison, Result
from experiments.definition import Definition, ProseModel
from experiments.efficiency import Efficiency
from measuring import results_file
from measuring.results_file import RESULTS

OUTPUT = Path("docs/results.md")
TEMPLATE = Path(__file__).with_name("report.md.jinja")


@dataclass(frozen=True)
class Experiment:
    """An experiment: its definition, its runs, and their times (None before batch times are measured).

    Attributes:
        file: The results file, relative to the page.
    """

    definition: Definition
    comparison: Comparison
    efficiency: Efficiency | None
    file: str

    @classmethod
    def load(cls, results: Path, name: str, output: Path) -> "Experiment":
        """From the folder of results.

        Raises:
            ConfigError: If the definition is faulty.
            DataError: If a file of results cannot be used.
        """
        file, times_file = results / f"{name}.jsonl", results / f"{name}_batch_times.json"
        own_definition = definition.load(name)
        runs = comparison.read(file, order=list(own_definition.modes))
        efficiency = None
        if times_file.exists():
            times = batch_times.read(times_file)
            numbers = (row.micro_batches for row in times.rows)
            efficiency = Efficiency.of(runs, numbers, partial(batch_times.batch_seconds, times))
        return cls(own_definition, runs, efficiency, os.path.relpath(file, output.parent))

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.comparison.name

    @property
    def link(self) -> str:
        """The name as code."""
        return f"`{self.name}`"

    @property
    def minutes(self) -> float:
        """Of all runs together."""
        return sum(result.record["seconds"] for result in self.comparison.all) / 60

    @property
    def flags(self) -> str:
        """The options that the runs were made with."""
        device = self.comparison.reference.record["device"]
        return "--jobs 2" if device == "cpu" else f"--device {device}"

    @property
    def duration(self) -> str:
        """Of all runs on one device."""
        minutes = self.definition.minutes
        if self.comparison.reference.record["device"] == "cpu":
            return f"{minutes:g} minutes of one core, {minutes / 2:g} of two"
        return f"{minutes:g} minutes of one device"

    @property
    def budget(self) -> str:
        """Model and budget in one line."""
        run, training = self.comparison.reference.run, self.comparison.reference.run.training
        clipped = training.max_gradient_norm
        return (
            f"{_model(run.model)}, in {run.num_stages} stages; {training.num_steps:,} steps of "
            f"{training.num_micro_batches * training.micro_batch_size} samples, "
            f"{'SGD' if training.optimizer == 'sgd' else 'AdamW'} with learning rate "
            f"{training.learning_rate:g} after {training.warmup_steps} steps of warm-up, "
            f"weight decay {training.weight_decay:g}"
            f"{f', gradients clipped to {clipped:g}' if clipped else ''}."
        )

    @property
    def missing(self) -> str:
        """Modes and seeds that are still to be run."""
        done = self.comparison.results
        seeds: dict[str, list[str]] = {}
        for run in self.definition.runs(self.name):
            if run.seed not in done.get(run.mode, {}):
                seeds.setdefault(run.mode, []).append(str(run.seed))
        modes = [mode for mode in self.definition.modes if mode in seeds]
        return ", ".join(f'"{mode}" ({", ".join(seeds[mode])})' for mode in modes)

    @property
    def not_timed(self) -> str:
        """Modes with the experiment's model that have no batch times."""
        runs, timed = self.comparison, self.efficiency.modes if self.efficiency else []
        return ", ".join(mode for mode in runs.modes if mode not in timed and not runs.has_own_model(mode))


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
    names = [*definition.names(), *(definition.SMOKE + name for name in definition.names())]
    done = [name for name in names if (results / f"{name}.jsonl").exists()]
    if not done:
        raise DataError(
            f"{results} has no results of any experiment ({', '.join(definition.names())}): make them with "
            "`python -m experiments.run NAME`, or give their folder with --results"
        )
    experiments = [Experiment.load(results, name, output) for name in done]
    finetuned = results_file.read(results / f"{finetune.NAME}.jsonl")
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        experiments=experiments,
        folder=os.path.relpath(results, output.parent),
        machines=_machines(experiments),
        summary=tables.summary((it.comparison, it.efficiency) for it in experiments),
        finetuned=finetune.table(finetuned) if finetuned else "",
        tables=tables,
        figures=figures,
        picture=partial(_picture, output.with_suffix("")),
    )
    replace_text(output, page)


def _model(model: definition.ProseModel | definition.ImageModel) -> str:
    if isinstance(model, ProseModel):
        return (
            f"{model.num_blocks} Transformer blocks, width {model.width}, {model.num_heads} attention heads, "
            f"{model.seq_length} characters of context"
        )
    number = "all" if model.num_train_images is None else f"{model.num_train_images:,}"
    return f"ResNet-{model.depth}, width {model.width}, {number} training images"


def _machines(experiments: Sequence[Experiment]) -> str:
    """Where the runs were made, a line for each machine and set of versions."""
    names: dict[str, dict[str, None]] = {}
    for experiment in experiments:
        for result in experiment.comparison.all:
            names.setdefault(_machine(result), {})[experiment.name] = None
    return "\n".join(f"- {', '.join(on_it)}: {machine}." for machine, on_it in names.items())


def _machine(result: Result) -> str:
    machine, versions = result.record["machine"], result.record["versions"]
    place = machine["gpu"] if result.record["device"] != "cpu" else "one core a run"
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    return (
        f"{machine['processor']}, {machine['num_cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}; {place}; {packages}"
    )


def _picture(folder: Path, experiment: Experiment, draw: Callable[[Comparison], Figure]) -> str:
    """Draws a picture; the link to it."""
    name = experiment.name
    file = folder / f"{name}_{draw.__name__}.svg"
    figures.save(draw(experiment.comparison), file)
    return f"![{name}: {draw.__name__.replace('_', ' ')}]({folder.name}/{file.name})"


if __name__ == "__main__":
    sys.exit(main())
