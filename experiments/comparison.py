"""The runs of an experiment by mode and seed, and the differences between modes.

Modes are compared seed by seed: all modes of a seed start from the same weights and see the same batches,
so that a difference between two of them varies less than either.
"""

import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_interlock.errors import DataError
from experiments.definition import GLOBAL, LOCAL, Run
from measuring import results_file
from measuring.results_file import Record


@dataclass(frozen=True)
class Curve:
    """Losses (of at least one step) after rising numbers of steps."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def first_crossing(self, target: float) -> float | None:
        """Steps after which the loss is at most ``target`` for the first time, linear between points.

        The first point if that is below already; None if the curve does not get there.
        """
        if self.losses[0] <= target:
            return float(self.steps[0])
        points = list(zip(self.steps, self.losses, strict=True))
        for (step, loss), (next_step, next_loss) in pairwise(points):
            if next_loss <= target:
                return step + (next_step - step) * (loss - target) / (loss - next_loss)
        return None

    def at(self, steps: float) -> float:
        """The loss after ``steps``, linear between points; the curve must reach there."""
        assert self.steps[0] <= steps <= self.steps[-1], "within the curve"
        if steps == self.steps[0]:
            return self.losses[0]
        number = bisect_left(self.steps, steps)
        step, next_step = self.steps[number - 1 : number + 1]
        loss, next_loss = self.losses[number - 1 : number + 1]
        return loss + (next_loss - loss) * (steps - step) / (next_step - step)


@dataclass(frozen=True)
class Spread:
    """A number for each of some seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """Of the values; None without any, or if one of them is None."""
        all_values = tuple(values)
        known = tuple(value for value in all_values if value is not None)
        return cls(known) if known and len(known) == len(all_values) else None


@dataclass(frozen=True)
class Result:
    """A line of the results file (``record``), and the run it is of."""

    run: Run
    record: Record

    @property
    def budget(self) -> int:
        """Batches after which quality is compared."""
        return self.run.training.num_steps

    @property
    def final(self) -> dict[str, float]:
        """The model's score at the end of the budget: "loss", and for images "error"."""
        score: dict[str, float] = self.record["final"]
        return score

    @property
    def curve(self) -> Curve:
        """Validation losses during training."""
        points = self.record["curve"]
        return Curve(tuple(p["step"] for p in points), tuple(p["loss"] for p in points))

    def series(self, key: str) -> dict[int, Any]:
        """The values of ``key`` in the points of the curve, by step; points without it are left out."""
        return {point["step"]: point[key] for point in self.record["curve"] if point.get(key) is not None}

    def at_the_end(self, key: str) -> Any:
        """The last of ``series`` within the budget; None if there is none."""
        within = [value for step, value in self.series(key).items() if step <= self.budget]
        return within[-1] if within else None


@dataclass(frozen=True)
class Comparison:
    """All results of an experiment.

    Attributes:
        name: Of the experiment.
        results: By mode and seed.
    """

    name: str
    results: dict[str, dict[int, Result]]

    @property
    def reference(self) -> Result:
        """A global run: model, budget and measurements are the same for all."""
        return next(iter(self.results[GLOBAL].values()))

    @property
    def modes(self) -> list[str]:
        """Their names."""
        return list(self.results)

    @property
    def all(self) -> list[Result]:
        """Every run."""
        return [result for of_mode in self.results.values() for result in of_mode.values()]

    def section(self, mode: str) -> dict[str, Any]:
        """The "interlock" section of the mode."""
        return self._first_run(mode).interlock

    def is_global(self, mode: str) -> bool:
        """Whether the mode is ordinary backpropagation throughout, maybe of another model."""
        return self._first_run(mode).section.is_global

    def has_own_model(self, mode: str) -> bool:
        """Whether the model, and so the time of a batch, differs from that of global."""
        return self._first_run(mode).model != self.reference.run.model

    def _first_run(self, mode: str) -> Run:
        """Of any seed."""
        return next(iter(self.results[mode].values())).run

    @property
    def is_images(self) -> bool:
        """Whether quality is an error rate rather than a loss."""
        return self.reference.run.model.kind == "images"

    @property
    def budget(self) -> int:
        """Batches after which quality is compared."""
        return self.reference.budget

    def quality(self, result: Result) -> float:
        """Test error in %, or validation loss in nats; less is better."""
        return 100 * result.final["error"] if self.is_images else result.final["loss"]

    def spread(self, mode: str, measure: Callable[[Result], float | None]) -> Spread | None:
        """``measure`` of each run of the mode."""
        return Spread.of(measure(result) for result in self.results[mode].values())

    def paired(self, modes: Sequence[str], measure: Callable[..., float | None]) -> Spread | None:
        """``measure`` of the runs of ``modes`` with one seed, for each seed that all of them have.

        Returns:
            None if there is no such seed, or no number for one of them.
        """
        runs = [self.results.get(mode, {}) for mode in modes]
        seeds = [seed for seed in runs[0] if all(seed in of_mode for of_mode in runs)]
        return Spread.of(measure(*(of_mode[seed] for of_mode in runs)) for seed in seeds)

    def gain_over_local(self, mode: str) -> Spread | None:
        """Quality less that of local, seed by seed: below 0 the mode is better."""
        return self.paired([mode, LOCAL], lambda one, local: self.quality(one) - self.quality(local))

    def recovered(self, mode: str) -> Spread | None:
        """Share of the gap between local and global that the mode closes, seed by seed.

        Returns:
            None also if local is not worse than global in one of the seeds: there is no gap then.
        """
        return self.paired([mode, LOCAL, GLOBAL], self._share)

    def _share(self, one: Result, local: Result, end_to_end: Result) -> float | None:
        gap = self.quality(local) - self.quality(end_to_end)
        return (self.quality(local) - self.quality(one)) / gap if gap > 0 else None


def read(path: Path, order: Sequence[str]) -> Comparison:
    """The comparison of all runs in a results file.

    Args:
        path: The file, named after the experiment.
        order: Modes in the order that they are to have; others follow.

    Raises:
        DataError: If a line is no run, no run is global, or two runs cannot be compared.
    """
    results: dict[str, dict[int, Result]] = {mode: {} for mode in order}
    for number, record in enumerate(results_file.read(path), start=1):
        result = _parse(path, number, record)
        of_mode = results.setdefault(result.run.mode, {})
        if result.run.seed in of_mode:
            raise DataError(
                f"{path}, line {number}: a second run of mode {result.run.mode}, seed {result.run.seed}: the "
                "experiment's file has changed in between; remove the line that is out of date"
            )
        of_mode[result.run.seed] = result
    results = {mode: dict(sorted(of_mode.items())) for mode, of_mode in results.items() if of_mode}
    if GLOBAL not in results:
        raise DataError(
            f"{path}: no run of mode global, which the others are compared with: run "
            f"`python -m experiments.run {path.stem} --modes global --resume`"
        )
    comparison = Comparison(path.stem, results)
    _check_comparable(path, comparison)
    return comparison


def _parse(path: Path, number: int, record: Record) -> Result:
    try:
        return Result(Run.model_validate(record["run"]), record)
    except (KeyError, ValidationError) as error:
        faults = error.errors() if isinstance(error, ValidationError) else [{"loc": error.args}]
        keys = ", ".join(".".join(map(str, fault["loc"])) for fault in faults)
        raise DataError(
            f"{path}, line {number}: not a run as this version describes it (wrong or missing: {keys}): "
            "remove the line, and run the experiment again with --resume"
        ) from error


def _check_comparable(path: Path, comparison: Comparison) -> None:
    reference = _of_experiment(comparison.reference.run)
    for of_mode in comparison.results.values():
        first = next(iter(of_mode.values())).run
        for run in (result.run for result in of_mode.values()):
            if _of_experiment(run) != reference or _of_mode(run) != _of_mode(first):
                raise DataError(
                    f"{path}: mode {run.mode}, seed {run.seed} is not of the same experiment as the runs "
                    "before: the experiment's file has changed in between; remove the lines that are out "
                    "of date, and run it again with --resume"
                )


def _of_experiment(run: Run) -> tuple[Any, ...]:
    """Equal for all runs of an experiment."""
    samples = (run.measurements.num_samples, run.measurements.num_final_samples)
    return run.training, run.num_stages, run.model.kind, samples


def _of_mode(run: Run) -> tuple[Any, ...]:
    """Equal for all runs of a mode, too."""
    return run.model, run.interlock, run.num_steps
