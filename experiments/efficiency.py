"""How long each mode takes to a loss: a curve of losses against steps, and the time of a batch.

    loss
     │╲  global                    T = time of a batch, of K devices
     │ ╲╲                          time to the target = steps x T
     │──╲─╲──────── target         speed-up = global's time to it / the mode's
     │   ╲  ╲___
     └────┴────┴─── steps

Every seed has a target of its own: the loss of global's curve at the end of its budget. A mode whose
gradient reach changes during training has another batch time in every phase.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from ds_interlock import InterlockConfig
from ds_interlock.errors import DataError
from experiments.comparison import Comparison, PerSeed
from experiments.definition import GLOBAL

ZERO_BUBBLE = {
    "global, ZB-H1 (computed)": {"zero_bubble": "ZB-H1"},
    "global, ZBV of torch": {"zero_bubble": "ZBV"},
}
"""Rows without runs of their own: global's numbers under schedules that split the backward pass."""

BatchSeconds = Callable[[Mapping[str, Any], int], float]
"""By the ``Run.flow`` of one phase and M, the time of a batch; raises DataError if not measured."""


class Phase(NamedTuple):
    """A part of training with one gradient flow."""

    from_step: int
    batch_seconds: float


def seconds_of(steps: float, phases: Sequence[Phase]) -> float:
    """Time of the first ``steps`` batches; the first phase begins at 0."""
    return sum(
        max(0.0, min(steps, end) - phase.from_step) * phase.batch_seconds for phase, end in _with_ends(phases)
    )


def steps_within(seconds: float, phases: Sequence[Phase]) -> float:
    """How many batches, parts of one included, fit into ``seconds``: the inverse of ``seconds_of``."""
    for phase, end in _with_ends(phases):
        in_phase = seconds / phase.batch_seconds
        if phase.from_step + in_phase <= end:
            break
        seconds -= (end - phase.from_step) * phase.batch_seconds
    return phase.from_step + in_phase


def _with_ends(phases: Sequence[Phase]) -> list[tuple[Phase, float]]:
    return list(zip(phases, [*(phase.from_step for phase in phases[1:]), float("inf")], strict=True))


def phase_sections(section: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The phases of an "interlock" section: the first step of each, and a section that means it alone.

    A section without a "schedule" is one phase.
    """
    if "schedule" not in section:
        return [(0, dict(section))]
    phases = InterlockConfig.from_deepspeed({"interlock": section}).phases
    return [(step, phase.model_dump(mode="json", exclude_defaults=True)) for step, phase in phases]


def _learns_as(mode: str) -> str:
    return GLOBAL if mode in ZERO_BUBBLE else mode


class Efficiency:
    """Times of the modes of an experiment that were timed and have its model; M counts micro-batches.

    ``phases`` are by mode, or row of ``ZERO_BUBBLE``, and by every M that it was timed at.

    Raises:
        DataError: If global was not timed.
    """

    def __init__(
        self, comparison: Comparison, micro_batches: Iterable[int], batch_seconds: BatchSeconds
    ) -> None:
        self.comparison, self.micro_batches = comparison, tuple(sorted(set(micro_batches)))
        self.phases: dict[str, dict[int, list[Phase]]] = {}
        modes = [mode for mode in comparison.results if not comparison.has_own_model(mode)]
        flows = {mode: comparison.run_of(mode).flow for mode in modes} | ZERO_BUBBLE
        for (mode, flow), m in product(flows.items(), self.micro_batches):
            try:
                phases = [Phase(step, batch_seconds(part, m)) for step, part in phase_sections(flow)]
                self.phases.setdefault(mode, {})[m] = phases
            except DataError:
                if mode == GLOBAL:
                    raise

    def steps(self, mode: str) -> dict[int, float | None]:
        """Steps to global's loss by seed (``Comparison.steps_to_target``); global's own for zero bubble."""
        return self.comparison.steps_to_target(_learns_as(mode))

    def batch_speeds(self, mode: str, m: int) -> list[float]:
        """How many times faster than global's a batch of the mode is, in each phase; [] if not timed."""
        (of_global,) = self.phases[GLOBAL][m]
        return [of_global.batch_seconds / p.batch_seconds for p in self.phases[mode].get(m, [])]

    def speed_up(self, mode: str, m: int) -> PerSeed | None:
        """Global's time to the target over the mode's, by seed; None if not timed or missed by a seed."""
        if m not in self.phases[mode]:
            return None
        of_global: dict[int, Any] = self.steps(GLOBAL)  # never None: the target is on its own curve
        return PerSeed.of(
            steps
            and seconds_of(of_global[seed], self.phases[GLOBAL][m]) / seconds_of(steps, self.phases[mode][m])
            for seed, steps in self.steps(mode).items()
        )

    def fastest(self, m: int) -> tuple[str, PerSeed] | None:
        """The mode with windows that reaches global's loss first, and its speed-up; None if none does."""
        modes = [mode for mode in self.phases if mode not in ZERO_BUBBLE]
        with_windows = [mode for mode in modes if not self.comparison.run_of(mode).section.is_global]
        gains = [(mode, gain) for mode in with_windows if (gain := self.speed_up(mode, m))]
        return max(gains, key=lambda item: item[1].mean, default=None)

    def at_equal_time(self, mode: str, m: int) -> tuple[PerSeed | None, bool]:
        """The loss after the time of global's budget, and whether it is a bound: a curve ends before.

        None if the mode was not timed.
        """
        if m not in self.phases[mode]:
            return None, False
        seconds = seconds_of(self.comparison.budget, self.phases[GLOBAL][m])
        steps = steps_within(seconds, self.phases[mode][m])
        curves = [result.curve for result in self.comparison.results[_learns_as(mode)].values()]
        return PerSeed(tuple(curve.at(steps) for curve in curves)), any(steps > c.steps[-1] for c in curves)
