"""The order in which every stage does its work for one batch.

A free stage takes the most urgent action that is ready (``GradientFlowPlan.urgency``): first a relay
and the head that starts one, for which a stage upstream waits; then the next forward, for which the
next stage waits, and of which the plan limits how many are in flight; and last the weight gradient,
for which no stage waits. Played through with costs in the proportions of a real stage, this gives every
stage the same order on every run: local learning becomes F H W, F H W, ...; global becomes 1F1B.
"""

import heapq
from bisect import insort

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.codes import Codes, codes_of
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.dependency import num_backward_passes
from ds_interlock.schedule.plan import GradientFlowPlan

_PASSES = (Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD)


def compute_order(
    plan: GradientFlowPlan, num_micro_batches: int, *, extra_in_flight: int = 0
) -> list[list[int]]:
    """The codes of one batch's compute actions for every stage, in an order valid whatever they cost.

    A stage may hold ``extra_in_flight`` micro-batches beyond ``plan.in_flight``.
    """
    if num_micro_batches < 1:
        raise ScheduleError(f"a batch needs at least 1 micro-batch, got {num_micro_batches}")
    if extra_in_flight < 0:
        raise ScheduleError(f"extra_in_flight is {extra_in_flight}: expected 0 or more")
    return _Dispatcher(codes_of(plan), num_micro_batches, extra_in_flight).run()


class _Dispatcher:
    """Plays one batch through, event by event."""

    def __init__(self, codes: Codes, num_micro_batches: int, extra_in_flight: int) -> None:
        plan, ops = codes.plan, codes.ops
        self.size = codes.size
        self.end = codes.size * num_micro_batches
        self.stage = [op.stage for op in ops]
        self.seconds = [CostModel().seconds(plan, op) for op in ops]
        self.is_pass = [op.kind in _PASSES for op in ops]
        # Ready actions of a stage are sorted by urgency, then by code: first the earliest micro-batch.
        self.urgency = [
            plan.urgency.index(op.kind) * self.end if op.kind in plan.urgency else 0 for op in ops
        ]
        self.unblocks: list[list[int]] = [[] for _ in ops]
        for op, needs in enumerate(codes.needs):
            for distance in needs:
                self.unblocks[(op + distance) % self.size].append(-distance)
        self.needs = codes.needs
        self.waiting = [len(needs) for needs in codes.needs] * num_micro_batches
        for op, needs in enumerate(codes.needs):
            self.waiting[op] -= -self.size in needs  # there is no micro-batch before the first
        stages = range(plan.num_stages)
        self.ready: list[list[int]] = [[] for _ in stages]
        self.order: list[list[int]] = [[] for _ in stages]
        self.busy = [False] * plan.num_stages
        self.slots = [plan.in_flight(stage) + extra_in_flight for stage in stages]
        self.passes_left = [[num_backward_passes(plan, stage)] * num_micro_batches for stage in stages]
        self.begun = [[False] * num_micro_batches for _ in stages]
        self.events: list[tuple[float, int]] = []

    def run(self) -> list[list[int]]:
        for op, needs in enumerate(self.needs):
            if needs and not self.waiting[op]:
                self._make_ready(op)
        now, touched = 0.0, set(self.stage)
        while True:
            for stage in touched:
                self._start(stage, now)
            if not self.events:
                return self.order
            # Everything that ends now is taken in before a stage chooses what comes next.
            now, touched = self.events[0][0], set()
            while self.events and self.events[0][0] == now:
                touched |= self._finish(heapq.heappop(self.events)[1])

    def _make_ready(self, code: int) -> int:
        """Notes that ``code`` may start; returns its stage."""
        op = code % self.size
        insort(self.ready[self.stage[op]], self.urgency[op] + code)
        return self.stage[op]

    def _start(self, stage: int, now: float) -> None:
        code = None if self.busy[stage] else self._choose(stage)
        if code is not None:
            self.busy[stage] = True
            self.order[stage].append(code)
            heapq.heappush(self.events, (now + self.seconds[code % self.size], code))

    def _choose(self, stage: int) -> int | None:
        """The most urgent ready action, except one that begins a micro-batch while its buffer is in use."""
        begun, left, slots = self.begun[stage], self.passes_left[stage], self.slots[stage]
        for place, entry in enumerate(self.ready[stage]):
            code = entry % self.end
            micro_batch = code // self.size
            if begun[micro_batch] or micro_batch < slots or not left[micro_batch - slots]:
                begun[micro_batch] = True
                del self.ready[stage][place]
                return code
        return None

    def _finish(self, code: int) -> set[int]:
        """The stages that may now have something to start."""
        micro_batch, op = divmod(code, self.size)
        stage = self.stage[op]
        self.busy[stage] = False
        self.passes_left[stage][micro_batch] -= self.is_pass[op]
        touched = {stage}
        for distance in self.unblocks[op]:
            unblocked = code + distance
            if unblocked < self.end:
                self.waiting[unblocked] -= 1
                if not self.waiting[unblocked]:
                    touched.add(self._make_ready(unblocked))
        return touched
