"""How long a mode takes to a loss: a curve of losses against steps, and the time of a batch.

    loss
     │╲  global                    T = time of a batch, of K devices
     │ ╲╲                          time to the target = steps x T
     │──╲─╲──────── target         speed-up = global's time to it / the mode's
     │   ╲  ╲___
     └────┴────┴─── steps

A mode whose gradient reach changes while it trains has another batch time in every phase.

Pure Python: no files, no measurements.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ds_interlock import InterlockConfig


@dataclass(frozen=True)
class Curve:
    """Losses against steps.

    Attributes:
        steps: Steps done, rising.
        losses: The loss after each of them.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.steps) == len(self.losses) > 0, "a loss for each step, and one at least"
        assert all(a < b for a, b in pairwise(self.steps)), "steps rise"

    def first_crossing(self, target: float) -> float | None:
        """Steps after which the loss is down at ``target`` for the first time, linear between points.

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
class Phase:
    """A part of training with one gradient flow, up to where the next begins.

    Attributes:
        from_step: Batches done before it.
        batch_seconds: What a batch takes.
    """

    from_step: int
    batch_seconds: float


def seconds_of(steps: float, phases: Sequence[Phase]) -> float:
    """What the first ``steps`` batches take; the first phase begins at 0."""
    total = 0.0
    for phase, end in zip(phases, _ends(phases), strict=True):
        total += max(0.0, min(steps, end) - phase.from_step) * phase.batch_seconds
    return total


def steps_within(seconds: float, phases: Sequence[Phase]) -> float:
    """How many batches, parts of one included, fit into ``seconds``: the inverse of ``seconds_of``."""
    for phase, end in zip(phases, _ends(phases), strict=True):
        in_phase = seconds / phase.batch_seconds
        if phase.from_step + in_phase <= end:
            return phase.from_step + in_phase
        seconds -= (end - phase.from_step) * phase.batch_seconds
    raise AssertionError("the last phase has no end")


def phase_sections(section: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The phases of an "interlock" section: the step each begins at, and a section that means it alone.

    A section without a "schedule" is one phase.
    """
    if "schedule" not in section:
        return [(0, dict(section))]
    phases = InterlockConfig.from_deepspeed({"interlock": section}).phases
    return [(step, phase.model_dump(mode="json", exclude_defaults=True)) for step, phase in phases]


def _ends(phases: Sequence[Phase]) -> list[float]:
    assert phases, "at least one phase"
    assert phases[0].from_step == 0, "the first phase begins at step 0"
    return [*(float(phase.from_step) for phase in phases[1:]), float("inf")]
