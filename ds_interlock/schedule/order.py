"""The order in which every stage does its work for one batch.

A free stage takes the most urgent action that is ready (``GradientFlowPlan.urgency``): first a relay
and the head that starts one, for which a stage upstream waits; then the next forward, for which the
next stage waits, and of which the plan limits how many are in flight; and last the weight gradient,
for which no stage waits. Played through with costs in the proportions of a real stage, this gives every
stage the same order on every run: local learning becomes F H W, F H W, ...; global becomes 1F1B.
"""

import heapq
from collections import defaultdict

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.dependency import dependencies, num_backward_passes, stage_actions
from ds_interlock.schedule.plan import GradientFlowPlan


def compute_order(
    plan: GradientFlowPlan, num_micro_batches: int, *, extra_in_flight: int = 0
) -> tuple[tuple[Action, ...], ...]:
    """The compute actions of one batch for every stage, in an order that is valid whatever they cost.

    A stage may hold ``extra_in_flight`` micro-batches beyond ``plan.in_flight``.
    """
    if num_micro_batches < 1:
        raise ScheduleError(f"a batch needs at least 1 micro-batch, got {num_micro_batches}")
    if extra_in_flight < 0:
        raise ScheduleError(f"extra_in_flight is {extra_in_flight}: expected 0 or more")
    return _Dispatcher(plan, num_micro_batches, extra_in_flight).run()


class _Dispatcher:
    """Plays one batch through, event by event."""

    def __init__(self, plan: GradientFlowPlan, num_micro_batches: int, extra_in_flight: int) -> None:
        self.plan = plan
        self.costs = CostModel()
        self.waiting: dict[Action, int] = {}
        self.unblocks: dict[Action, list[Action]] = defaultdict(list)
        self.ready: list[list[tuple[int, int, Action]]] = [[] for _ in range(plan.num_stages)]
        self.order: list[list[Action]] = [[] for _ in range(plan.num_stages)]
        self.slots = [plan.in_flight(stage) + extra_in_flight for stage in range(plan.num_stages)]
        self.begun: set[tuple[int, int]] = set()  # stage and micro-batch
        self.passes_left: dict[tuple[int, int], int] = {}
        self.events: list[tuple[float, Action]] = []
        self.busy = [False] * plan.num_stages
        for stage in range(plan.num_stages):
            for micro_batch in range(num_micro_batches):
                self.passes_left[stage, micro_batch] = num_backward_passes(plan, stage)
                for action in stage_actions(plan, stage, micro_batch):
                    needs = dependencies(plan, action)
                    self.waiting[action] = len(needs)
                    if not needs:
                        self._make_ready(action)
                    for needed in needs:
                        self.unblocks[needed].append(action)

    def run(self) -> tuple[tuple[Action, ...], ...]:
        now = 0.0
        self._start(now)
        while self.events:
            # Everything that ends now is taken in before a stage chooses what comes next.
            now = self.events[0][0]
            while self.events and self.events[0][0] == now:
                self._finish(heapq.heappop(self.events)[1])
            self._start(now)
        assert sum(map(len, self.order)) == len(self.waiting), "every action of a plan can run"
        return tuple(tuple(actions) for actions in self.order)

    def _make_ready(self, action: Action) -> None:
        urgency = self.plan.urgency.index(action.kind)
        self.ready[action.stage].append((urgency, action.micro_batch, action))

    def _start(self, now: float) -> None:
        for stage in range(self.plan.num_stages):
            action = None if self.busy[stage] else self._choose(stage)
            if action is not None:
                self.busy[stage] = True
                self.order[stage].append(action)
                heapq.heappush(self.events, (now + self.costs.seconds(self.plan, action), action))

    def _choose(self, stage: int) -> Action | None:
        """The most urgent ready action, except one that begins a micro-batch while its buffer is in use."""
        for entry in sorted(self.ready[stage]):
            _, micro_batch, action = entry
            begun = (stage, micro_batch) in self.begun
            if begun or not self.passes_left.get((stage, micro_batch - self.slots[stage])):
                self.begun.add((stage, micro_batch))
                self.ready[stage].remove(entry)
                return action
        return None

    def _finish(self, action: Action) -> None:
        self.busy[action.stage] = False
        if action.kind in (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD):
            self.passes_left[action.stage, action.micro_batch] -= 1
        for unblocked in self.unblocks[action]:
            self.waiting[unblocked] -= 1
            if self.waiting[unblocked] == 0:
                self._make_ready(unblocked)
