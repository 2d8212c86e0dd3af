"""From the order of work to a program: what a stage loads, receives, computes and sends, in order.

Communication is added here and only here. A send follows the action that made the message; the receives
are placed into the neighbour's program in the order of the sends. A receive is *posted* early (its data
may arrive while the stage works), but never more than ``RECEIVE_AHEAD`` ahead of the work that takes it,
which also keeps a fast stage from running away from a slow one.

    stage 0:  LOAD0 F0 SEND_F0 | LOAD1 F1 SEND_F1 | W0 ...
    stage 1:  RECV_F0 RECV_F1 | F0 H0@0 I0@0 SEND_I0@0 | RECV_F2 | F1 ...
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ds_interlock.schedule.action import COMPUTE_KINDS, Action, Kind
from ds_interlock.schedule.dependency import batch_end, dependencies, evaluation_actions
from ds_interlock.schedule.order import compute_order
from ds_interlock.schedule.plan import GradientFlowPlan

RECEIVE_AHEAD = 2
"""Messages a stage may have posted receives for, or hold, that its work has not taken yet."""


@dataclass(frozen=True)
class Program:
    """Everything every stage does for one batch."""

    plan: GradientFlowPlan
    num_micro_batches: int
    slots: tuple[int, ...]  # by stage: micro-batches it may hold the activations of
    stages: tuple[tuple[Action, ...], ...]  # by stage: its actions in order, communication included

    def buffer(self, action: Action) -> int:
        """The activation buffer ``action`` works on: a micro-batch keeps it until its last pass."""
        return action.micro_batch % self.slots[action.stage]


def micro_batch_starts(actions: Iterable[Action]) -> Iterator[tuple[Action, tuple[Action, ...]]]:
    """Of a stage's actions the first of each micro-batch, and those of the micro-batches then in flight."""
    work = [action for action in actions if action.kind in COMPUTE_KINDS - {Kind.STEP}]
    last = {action.micro_batch: action for action in work}
    live: dict[int, Action] = {}
    for action in work:
        if action.micro_batch not in live:
            yield action, tuple(live.values())
            live[action.micro_batch] = action
        if last[action.micro_batch] == action:
            del live[action.micro_batch]


@lru_cache(maxsize=128)  # called at every batch
def training_program(plan: GradientFlowPlan, num_micro_batches: int, *, extra_in_flight: int = 0) -> Program:
    """The program of one training batch: ordered, lowered, ready to run."""
    order = compute_order(plan, num_micro_batches, extra_in_flight=extra_in_flight)
    slots = tuple(plan.in_flight(stage) + extra_in_flight for stage in range(plan.num_stages))
    work = [(*actions, *batch_end(stage, num_micro_batches)) for stage, actions in enumerate(order)]
    return Program(plan, num_micro_batches, slots, lower(plan, work))


@lru_cache(maxsize=128)
def evaluation_program(plan: GradientFlowPlan, num_micro_batches: int, *, all_heads: bool) -> Program:
    """Forward only: the final loss of every micro-batch, or with ``all_heads`` every head's."""
    work = [
        [a for n in range(num_micro_batches) for a in evaluation_actions(plan, stage, n, all_heads=all_heads)]
        for stage in range(plan.num_stages)
    ]
    return Program(plan, num_micro_batches, (1,) * plan.num_stages, lower(plan, work))


def lower(plan: GradientFlowPlan, work: Sequence[Sequence[Action]]) -> tuple[tuple[Action, ...], ...]:
    """Adds loads, sends and receives to the ``work`` of every stage."""
    programs = [_with_loads_and_sends(plan, actions) for actions in work]
    for stage in range(plan.num_stages):
        for neighbour, kind in ((stage - 1, Kind.SEND_FORWARD), (stage + 1, Kind.SEND_GRADIENT)):
            if 0 <= neighbour < plan.num_stages:
                messages = [action for action in programs[neighbour] if action.kind is kind]
                programs[stage] = _with_receives(plan, programs[stage], messages)
    return tuple(tuple(program) for program in programs)


def send_of(plan: GradientFlowPlan, action: Action) -> Action | None:
    """The send of what ``action`` made, or None if it stays on its stage."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind is Kind.FORWARD and not action.losses and stage + 1 < plan.num_stages:
        return Action(stage, Kind.SEND_FORWARD, micro_batch)
    if action.kind is Kind.INPUT_GRADIENT:
        return Action(stage, Kind.SEND_GRADIENT, micro_batch, action.losses)
    if action.kind is Kind.BACKWARD:
        return Action(stage, Kind.SEND_GRADIENT, micro_batch, plan.bundles(stage)[0])
    return None


def receive_of(send: Action) -> Action:
    """The receive at the other end of ``send``."""
    if send.kind is Kind.SEND_FORWARD:
        return Action(send.stage + 1, Kind.RECV_FORWARD, send.micro_batch)
    return Action(send.stage - 1, Kind.RECV_GRADIENT, send.micro_batch, send.losses)


def receives_needed(plan: GradientFlowPlan, action: Action) -> tuple[Action, ...]:
    """The receives that must be complete before the compute ``action`` can start."""
    if action.kind not in COMPUTE_KINDS or action.kind is Kind.STEP:
        return ()
    sends = [send_of(plan, needed) for needed in dependencies(plan, action) if needed.stage != action.stage]
    return tuple(receive_of(send) for send in sends if send is not None)


def _with_loads_and_sends(plan: GradientFlowPlan, actions: Sequence[Action]) -> list[Action]:
    program: list[Action] = []
    loaded: set[int] = set()
    for action in actions:
        if action.stage == 0 and action.kind is Kind.FORWARD and action.micro_batch not in loaded:
            loaded.add(action.micro_batch)
            program.append(Action(0, Kind.LOAD, action.micro_batch))
        program.append(action)
        send = send_of(plan, action)
        if send is not None:
            program.append(send)
    return program


def _with_receives(plan: GradientFlowPlan, program: list[Action], sends: list[Action]) -> list[Action]:
    """Places the receives that match ``sends``, in their order, as early as ``RECEIVE_AHEAD`` lets it."""
    taken_at: dict[Action, int] = {}
    for position, action in enumerate(program):
        for receive in receives_needed(plan, action):
            taken_at.setdefault(receive, position)
    receives = [receive_of(send) for send in sends]
    takes = [taken_at[receive] for receive in receives]
    before: dict[int, list[Action]] = defaultdict(list)
    latest = len(program)
    for number, receive in reversed(list(enumerate(receives))):
        early = takes[number - RECEIVE_AHEAD] + 1 if number >= RECEIVE_AHEAD else 0
        # No later than its own use, and no later than later receives of the link.
        latest = min(latest, takes[number], early)
        before[latest].insert(0, receive)
    return [each for position, action in enumerate(program) for each in (*before[position], action)]
