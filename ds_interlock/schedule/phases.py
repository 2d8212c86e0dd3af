"""A gradient-flow plan for every step: the reach of the losses as a schedule.

    step       0            2000                  8000
    phase      0: window 1  1: window 2           2: global
    heads      a  b  c         b  c                              built once, a..c, kept throughout

A run with one plan is a schedule of one phase; whatever differs between phases derives from here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from ds_interlock.errors import PlanError, list_faults
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead, rises


@dataclass(frozen=True)
class Phase:
    """A plan, and the number of optimizer steps after which it comes into force."""

    from_step: int
    plan: GradientFlowPlan


@dataclass(frozen=True)
class PlanSchedule:
    """Which plan is in force at which step. All plans are for the same layers in the same stages.

    Attributes:
        phases: In order; the first from step 0.

    Raises:
        PlanError: Listing every fault, if the phases do not fit together.
    """

    phases: tuple[Phase, ...]

    @classmethod
    def of(cls, *phases: tuple[int, GradientFlowPlan]) -> Self:
        """A schedule of ``(from_step, plan)`` pairs."""
        return cls(tuple(Phase(from_step, plan) for from_step, plan in phases))

    @classmethod
    def constant(cls, plan: GradientFlowPlan) -> Self:
        """The same plan from beginning to end."""
        return cls.of((0, plan))

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        faults = _faults(self.phases)
        if faults:
            raise PlanError(list_faults("schedule of gradient-flow plans", faults))

    @property
    def stage_bounds(self) -> tuple[int, ...]:
        """The stage bounds of all plans."""
        return self.phases[0].plan.stage_bounds

    @property
    def is_end_to_end(self) -> bool:
        """True if every phase is ordinary backpropagation."""
        return all(phase.plan.is_end_to_end for phase in self.phases)

    def phase_at(self, step: int) -> int:
        """The number of the phase in force once ``step`` optimizer steps are done."""
        return max(number for number, phase in enumerate(self.phases) if phase.from_step <= step)

    def plan_at(self, step: int) -> GradientFlowPlan:
        """The plan in force once ``step`` optimizer steps are done."""
        return self.phases[self.phase_at(step)].plan

    @cached_property
    def heads(self) -> tuple[LossHead, ...]:
        """The auxiliary heads of all phases, one for each position, as in their first phase, in its order."""
        first: dict[int, LossHead] = {}
        for phase in self.phases:
            for head in phase.plan.heads[:-1]:
                first.setdefault(head.after_layer, head)
        return tuple(first.values())

    def is_idle(self, head: int, phase: int) -> bool:
        """True if the head with this index takes no part in the phase with this number."""
        used = {place.after_layer for place in self.phases[phase].plan.heads[:-1]}
        return self.heads[head].after_layer not in used

    @cached_property
    def plan_with_all_heads(self) -> GradientFlowPlan:
        """A plan with the heads of all phases, for forward passes only: no phase has its gradient flow."""
        bounds = self.stage_bounds
        heads = sorted(self.heads, key=lambda head: head.after_layer)
        heads.append(self.phases[0].plan.heads[-1])
        after = [{loss for loss, head in enumerate(heads) if head.after_layer >= end} for end in bounds[1:]]
        return GradientFlowPlan(bounds, tuple(heads), tuple(map(frozenset, after)))


def faults_of_steps(steps: Sequence[int]) -> list[str]:
    """What is wrong with the steps at which phases begin; empty if nothing is."""
    if not steps:
        return ["it has no phases: the first must begin at step 0"]
    faults = []
    if steps[0] != 0:
        faults.append(f"the first phase begins at step {steps[0]}, expected 0")
    if not rises(steps):
        faults.append(f"the phases begin at steps {list(steps)}, expected rising numbers")
    return faults


def _faults(phases: Sequence[Phase]) -> list[str]:
    faults = faults_of_steps([phase.from_step for phase in phases])
    if not phases:
        return faults
    first, *others = [list(phase.plan.stage_bounds) for phase in phases]
    return faults + [
        f"phase {number} is for stage_bounds {bounds}, phase 0 for {first}: they must be the same"
        for number, bounds in enumerate(others, 1)
        if bounds != first
    ]
