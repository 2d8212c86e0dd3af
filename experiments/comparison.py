"""The runs of an experiment by mode and seed, and the differences between modes.

Modes are compared seed by seed: all modes of a seed start from the same weights and see the same batches,
so that a difference between two of them varies less than either.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ds_interlock.errors import DataError
from ds_interlock.files import faults_of
from experiments.definition import GLOBAL, LEARNING, LOCAL, Run
from measuring import results_file
from measuring.results_file import Record

NOTHING = "–"
"""In a table."""

_LEAST_GAP = 1.005  # local's quality over global's: shares of less are noise

_SCORES: dict[str, Callable[[dict[str, float]], float]] = {
    "error": lambda final: 100 * final["error"],  # %
    "loss": lambda final: final["loss"],  # nats
    "perplexity": lambda final: math.exp(final["loss"]),
}


@dataclass(frozen=True)
class Curve:
    """Losses (of at least one step) after rising numbers of steps."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def first_crossing(self, target: float) -> float | None:
        """Steps until the loss is at most ``target``, linear between points; None if it never is."""
        if self.losses[0] <= target:
            return float(self.steps[0])
        points = zip(self.steps, self.losses, strict=True)
        for (step, loss), (next_step, next_loss) in pairwise(points):
            if next_loss <= target:
                return step + (next_step - step) * (loss - target) / (loss - next_loss)
        return None

    def at(self, steps: float) -> float:
        """The loss after ``steps``, linear between points; that of the first or last point outside them."""
        return float(np.interp(steps, self.steps, self.losses))


@dataclass(frozen=True)
class PerSeed:
    """A number for each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "PerSeed | None":
        """None without any value, or if one of them is None."""
        all_values = tuple(values)
        known = tuple(value for value in all_values if value is not None)
        return cls(known) if known and len(known) == len(all_values) else None


def cell(numbers: PerSeed | None, digits: int, *, signed: bool = False) -> str:
    """``1.23 ± 0.04``; of a single seed the number alone; a dash for nothing."""
    if numbers is None:
        return NOTHING
    deviation = "" if numbers.deviation is None else f" ± {numbers.deviation:.{digits}f}"
    return f"{numbers.mean:{'+' if signed else ''}.{digits}f}{deviation}"


def percent(numbers: PerSeed | None) -> str:
    """A share as ``75 ± 4 %``."""
    return f"{cell(PerSeed(tuple(100 * value for value in numbers.values)), 0)} %" if numbers else NOTHING


@dataclass(frozen=True)
class Result:
    """A line of the results file (``record``), and its run."""

    run: Run
    record: Record

    @property
    def place(self) -> str:
        """The machine and the versions."""
        machine = self.record["machine"]
        device = machine["gpu"] if self.record["device"] != "cpu" else "one core per run"
        memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        versions = ", ".join(f"{name} {version}" for name, version in self.record["versions"].items())
        cores = f"{machine['processor']}, {machine['num_cores']} cores"
        return f"{cores}, {memory}, {machine['system']}; {device}; {versions}"

    @property
    def curve(self) -> Curve:
        """Validation losses during training."""
        losses = self.series("loss")
        return Curve(tuple(losses), tuple(losses.values()))

    def series(self, key: str) -> dict[int, Any]:
        """The values of ``key`` in the points of the curve, by step; points without it are left out."""
        return {point["step"]: point[key] for point in self.record["curve"] if point.get(key) is not None}

    def at_the_end(self, key: str) -> Any:
        """The last of ``series`` within the budget; None if it has none."""
        within = [value for step, value in self.series(key).items() if step <= self.run.training.num_steps]
        return within[-1] if within else None


@dataclass(frozen=True)
class Comparison:
    """All results of an experiment, by mode and seed."""

    name: str
    results: dict[str, dict[int, Result]]

    @property
    def reference(self) -> Result:
        """A global run: model, budget and measurements are the same for all."""
        return next(iter(self.results[GLOBAL].values()))

    @property
    def all(self) -> list[Result]:
        """Every run."""
        return [result for of_mode in self.results.values() for result in of_mode.values()]

    def run_of(self, mode: str) -> Run:
        """The mode's run of any seed: model, section and number of steps are the same for all."""
        return next(iter(self.results[mode].values())).run

    def has_own_model(self, mode: str) -> bool:
        """Whether the model, and so the time of a batch, differs from that of global."""
        return self.run_of(mode).model != self.reference.run.model

    @property
    def is_images(self) -> bool:
        """Whether quality is an error rate instead of a loss."""
        return self.reference.run.model.kind == "images"

    @property
    def budget(self) -> int:
        """Batches after which quality is compared."""
        return self.reference.run.training.num_steps

    def score(self, mode: str, name: str) -> PerSeed | None:
        """At the end of the budget: "error" (images only, %), "loss" (nats) or "perplexity"."""
        return PerSeed.of(_SCORES[name](one.record["final"]) for one in self.results[mode].values())

    def gain_over_local(self, mode: str, local: str = LOCAL) -> PerSeed | None:
        """Quality less that of ``local``, seed by seed: below 0 the mode is better."""
        return PerSeed.of(one - of_local for one, of_local in self._qualities([mode, local]))

    def recovered(self, mode: str) -> PerSeed | None:
        """Share of local's gap to global that the mode closes, by seed; None if a seed has hardly a gap."""
        qualities = self._qualities([mode, LOCAL, GLOBAL])
        return PerSeed.of(
            (local - one) / (local - of_global) if local > of_global * _LEAST_GAP else None
            for one, local, of_global in qualities
        )

    def steps_to_target(self, mode: str) -> dict[int, float | None]:
        """Steps in which the mode gets to global's loss, by seed that global has too; None if never."""
        reference = self.results[GLOBAL]
        return {
            seed: result.curve.first_crossing(reference[seed].curve.at(self.budget))
            for seed, result in self.results[mode].items()
            if seed in reference
        }

    def first_rms(self, mode: str) -> PerSeed | None:
        """Root mean square of the first stage's output at the end of the budget."""
        return PerSeed.of(one.at_the_end("stage_rms")[0] for one in self.results[mode].values())

    def growth(self, mode: str) -> tuple[int, PerSeed] | None:
        """The stage whose output grows most, and the RMS of its output over that under global.

        The ratio is the largest on average over the seeds, so that the deviation is that of one stage.
        """
        ends = [[one.at_the_end("stage_rms") for one in runs] for runs in self._with_one_seed([mode, GLOBAL])]
        stages = range(self.reference.run.num_stages - 1)
        ratios = {
            stage: PerSeed.of(one[stage] / of_global[stage] for one, of_global in ends) for stage in stages
        }
        known = {stage: numbers for stage, numbers in ratios.items() if numbers}
        return max(known.items(), key=lambda item: item[1].mean, default=None)

    def cosines(self, mode: str) -> list[PerSeed | None]:
        """Of each stage with the global gradient, last measured within the budget; empty if not measured."""
        by_seed = [result.at_the_end("cosine") for result in self.results[mode].values()]
        return [] if None in by_seed else [PerSeed.of(of_stage) for of_stage in zip(*by_seed, strict=True)]

    def _with_one_seed(self, modes: Sequence[str]) -> list[list[Result]]:
        """For each seed that all of ``modes`` have, their runs."""
        runs = [self.results.get(mode, {}) for mode in modes]
        return [[of_mode[seed] for of_mode in runs] for seed in sorted(set.intersection(*map(set, runs)))]

    def _qualities(self, modes: Sequence[str]) -> list[list[float]]:
        """Of the same runs: test error in %, or validation loss in nats; less is better."""
        score = _SCORES["error" if self.is_images else "loss"]
        return [[score(one.record["final"]) for one in runs] for runs in self._with_one_seed(modes)]


def read(path: Path, order: Sequence[str]) -> Comparison:
    """The comparison of all runs in a results file, first of the modes in ``order``, then of others.

    Raises:
        DataError: If a line is no run, no run is global, or two runs cannot be compared.
    """
    results: dict[str, dict[int, Result]] = {mode: {} for mode in order}
    for number, record in enumerate(results_file.read(path), start=1):
        try:
            run = Run.model_validate(record.get("run"))
        except ValidationError as error:
            raise DataError(
                f"{path}, line {number}: not a run of this version ({'; '.join(faults_of(error))}): remove "
                "the line, and run the experiment again with --resume"
            ) from error
        if run.seed in results.setdefault(run.mode, {}):
            raise DataError(
                f"{path}, line {number}: a second run of mode {run.mode}, seed {run.seed}, after a change of "
                "the experiment's file: remove the line that is out of date"
            )
        results[run.mode][run.seed] = Result(run, record)
    results = {mode: dict(sorted(of_mode.items())) for mode, of_mode in results.items() if of_mode}
    if GLOBAL not in results:
        raise DataError(
            f"{path}: no run of mode global, which the others are compared with: run "
            f"`python -m experiments.run {path.stem} --modes global --resume`"
        )
    comparison = Comparison(path.stem, results)
    for run in (result.run for result in comparison.all):
        of_mode = comparison.run_of(run.mode).model_copy(update={"seed": run.seed})
        if run != of_mode or _common(run) != _common(comparison.reference.run):
            raise DataError(
                f"{path}: mode {run.mode}, seed {run.seed} is not of the same experiment as the runs before: "
                "remove the lines that are out of date, and run it again with --resume"
            )
    return comparison


def _common(run: Run) -> tuple[Any, ...]:
    """Equal for all runs of an experiment."""
    training = run.training.model_dump(exclude=LEARNING)
    return training, run.num_stages, run.model.kind, run.measurements
