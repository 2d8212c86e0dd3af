"""What a mode gains in time: its curves of losses, combined with the measured time of a batch.

Every seed has a target of its own: the loss that global's curve is at when its budget ends.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_interlock.errors import DataError
from experiments.comparison import Comparison, Result, Spread
from experiments.definition import GLOBAL
from experiments.time_to_loss import Phase, phase_sections, seconds_of, steps_within

BatchSeconds = Callable[[Mapping[str, Any], int], float]
"""Of an "interlock" section of one phase and a number of micro-batches: what a batch takes.

Raises DataError if that was not measured."""


@dataclass(frozen=True)
class EqualTime:
    """The loss of a mode after the time that global's budget takes.

    Attributes:
        loss: Over the seeds.
        is_bound: Whether a curve ends before, so that the loss is its last one.
    """

    loss: Spread
    is_bound: bool


@dataclass(frozen=True)
class Efficiency:
    """Times of the modes of an experiment.

    Attributes:
        comparison: The runs.
        micro_batches: The numbers of micro-batches M that batches were timed with.
        phases: What a batch takes, by mode and M; modes that were not timed, or have a model of their own,
            are left out.
    """

    comparison: Comparison
    micro_batches: tuple[int, ...]
    phases: dict[str, dict[int, list[Phase]]]

    @classmethod
    def of(
        cls, comparison: Comparison, micro_batches: Iterable[int], batch_seconds: BatchSeconds
    ) -> "Efficiency":
        """Looks up the times of all modes.

        Raises:
            DataError: If global was not timed.
        """
        numbers = tuple(sorted(set(micro_batches)))
        phases = {}
        for mode in comparison.modes:
            if comparison.has_own_model(mode):
                continue
            section = comparison.section(mode)
            try:
                phases[mode] = {m: _phases(section, m, batch_seconds) for m in numbers}
            except DataError:
                if mode == GLOBAL:
                    raise
        return cls(comparison, numbers, phases)

    @property
    def modes(self) -> list[str]:
        """Those that were timed."""
        return list(self.phases)

    def steps(self, mode: str) -> list[float | None]:
        """For each seed with a global run, the steps in which the mode gets to its loss; None if never."""
        seeds = self.comparison.results[mode].items()
        return [
            result.curve.first_crossing(self._target(seed))
            for seed, result in seeds
            if seed in self.comparison.results[GLOBAL]
        ]

    def batch_speeds(self, mode: str, num_micro_batches: int) -> list[float]:
        """How many times faster than global's a batch of the mode is, in each of its phases."""
        (of_global,) = self.phases[GLOBAL][num_micro_batches]
        return [of_global.batch_seconds / p.batch_seconds for p in self.phases[mode][num_micro_batches]]

    def speed_up(self, mode: str, num_micro_batches: int) -> Spread | None:
        """How many times sooner than global the mode is at the target, seed by seed.

        Returns:
            None if it does not get there in one of the seeds.
        """

        def of_seed(result: Result, reference: Result) -> float | None:
            target = self._target(result.run.seed)
            steps, of_global = (one.curve.first_crossing(target) for one in (result, reference))
            assert of_global is not None, "the target is on global's own curve"
            if steps is None:
                return None
            global_seconds = seconds_of(of_global, self.phases[GLOBAL][num_micro_batches])
            return global_seconds / seconds_of(steps, self.phases[mode][num_micro_batches])

        return self.comparison.paired([mode, GLOBAL], of_seed)

    def at_equal_time(self, mode: str, num_micro_batches: int) -> EqualTime:
        """Where the mode is when global's budget is over."""
        seconds = seconds_of(self.comparison.budget, self.phases[GLOBAL][num_micro_batches])
        steps = steps_within(seconds, self.phases[mode][num_micro_batches])
        curves = [result.curve for result in self.comparison.results[mode].values()]
        losses = tuple(curve.at(min(max(steps, curve.steps[0]), curve.steps[-1])) for curve in curves)
        return EqualTime(Spread(losses), any(steps > curve.steps[-1] for curve in curves))

    def _target(self, seed: int) -> float:
        return self.comparison.results[GLOBAL][seed].curve.at(self.comparison.budget)


def _phases(section: Mapping[str, Any], num_micro_batches: int, batch_seconds: BatchSeconds) -> list[Phase]:
    return [
        Phase(from_step, batch_seconds(of_phase, num_micro_batches))
        for from_step, of_phase in phase_sections(section)
    ]
