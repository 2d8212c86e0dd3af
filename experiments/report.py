"""Writes docs/results.md and its pictures, and what the planner knows, from the experiments' results files.

    python -m experiments.report                                  # docs/experiments -> docs/results.md
    python -m experiments.report --results runs/mine --output runs/mine/results.md

Of every experiment in experiments/definitions the folder may have NAME.jsonl, written by experiments.run, and
NAME_batch_times.json, written by experiments.batch_times. All numbers come from these files; the same files
give the same page and pictures, byte for byte. The page's text is in report.md.jinja, its tables are in
tables.md.jinja. What the planner knows of how well settings learn (measured.py) goes to its own file from
docs/experiments, and beside the page from another folder.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from ds_interlock.errors import DataError
from ds_interlock.files import replace_text
from ds_interlock.planning import quality
from experiments import batch_times, comparison, definition, figures, finetune, measured
from experiments.comparison import NOTHING, Comparison, PerSeed, cell, percent
from experiments.efficiency import Efficiency
from measuring import results_file
from measuring.command import command_parser, exit_status
from measuring.results_file import RESULTS

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
ENVIRONMENT.globals.update(NOTHING=NOTHING, cell=cell, percent=percent, per_seed=PerSeed.of)


class Experiment:
    """An experiment: its definition, its runs, and their times (None before batch times are measured).

    It is read from the folder of results; errors as of ``write``.
    """

    def __init__(self, results: Path, name: str) -> None:
        self.name, self.definition = name, definition.load(name)
        self.comparison = comparison.read(results / f"{name}.jsonl", order=list(self.definition.modes))
        self.efficiency: Efficiency | None = None
        times_file = results / f"{name}_batch_times.json"
        if times_file.exists():
            times = batch_times.read(times_file)
            numbers = (row.micro_batches for row in times.rows)
            self.efficiency = Efficiency(self.comparison, numbers, partial(batch_times.batch_seconds, times))

    @property
    def missing(self) -> dict[str, list[int]]:
        """Seeds that are still to be run, by mode."""
        runs, done = self.definition.runs(self.name), self.comparison.results
        missing = {
            mode: [run.seed for run in runs if run.mode == mode and run.seed not in done.get(mode, {})]
            for mode in self.definition.modes
        }
        return {mode: seeds for mode, seeds in missing.items() if seeds}

    @property
    def not_timed(self) -> list[str]:
        """Modes with the experiment's model that have no batch times."""
        runs, timed = self.comparison, self.efficiency.phases if self.efficiency else ()
        return [mode for mode in runs.results if mode not in timed and not runs.has_own_model(mode)]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; the exit status."""
    parser = command_parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files (%(default)s)")
    text = "the page; pictures go to a folder beside it (%(default)s)"
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"), help=text)
    args = parser.parse_args(argv)
    known = quality.FILE if args.results == RESULTS else args.output.with_name(quality.FILE.name)
    return exit_status(partial(write, args.results, args.output, known))


def write(results: Path, output: Path, known: Path) -> None:
    """Writes the page, its pictures, and to ``known`` what the planner knows.

    Raises:
        ConfigError: If an experiment's definition is faulty.
        DataError: If there are no results, or a file of results cannot be used.
    """
    done = [name for name in definition.names() if (results / f"{name}.jsonl").exists()]
    if not done:
        raise DataError(
            f"{results} has no results of any experiment ({', '.join(definition.names())}): make them with "
            "`python -m experiments.run NAME`, or give their folder with --results"
        )
    experiments = [Experiment(results, name) for name in done]
    page = ENVIRONMENT.get_template("report.md.jinja").render(
        experiments=experiments,
        folder=os.path.relpath(results, output.parent),
        results=[result for it in experiments for result in it.comparison.all],
        finetuned={
            name: finetune.table(results_file.read(results / f"{name}.jsonl")) for name in finetune.NAMES
        },
        figures=figures,
        picture=partial(_picture, output.with_suffix("")),
    )
    replace_text(output, page)
    measured.write((it.comparison for it in experiments), known)
    print(output)


def _picture(folder: Path, experiment: Experiment, draw: Callable[[Comparison], Figure]) -> str:
    """Draws a picture; the link to it."""
    name = experiment.name
    file = folder / f"{name}_{draw.__name__}.svg"
    figures.save(draw(experiment.comparison), file)
    return f"![{name}: {draw.__name__.replace('_', ' ')}]({folder.name}/{file.name})"


if __name__ == "__main__":
    sys.exit(main())
