"""From the order of work to a program: what a stage loads, receives, computes and sends, in order.

Communication is added here and only here. A send follows the action that made the message; the receives
are placed into the neighbour's program in the order of the sends. A receive is *posted* early (its data
may arrive while the stage works), but only so many messages ahead of the work that takes it, which also
keeps a fast stage from running away from a slow one.

    stage 0:  LOAD0 F0 SEND_F0 | LOAD1 F1 SEND_F1 | W0 ...
    stage 1:  RECV_F0 RECV_F1 | F0 H0@0 I0@0 SEND_I0@0 | RECV_F2 | F1 ...

How many is a property of the program: as few as let all stages finish even if every send waits until its
receive is posted, but at least ``RECEIVE_AHEAD``. With fewer the stages can wait for each other: one to
send a forward, the next one to send a gradient back.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.codes import Codes
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.standstill import standstill

RECEIVE_AHEAD = 2
"""Messages of a link a stage may have posted receives for, or hold, that its work has not taken; at least."""


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


def lower(codes: Codes, work: Sequence[Sequence[int]]) -> tuple[tuple[Action, ...], ...]:
    """Adds loads, sends and receives to the ``work`` of every stage, given in ``codes``.

    Raises:
        ScheduleError: If the stages would wait for each other however early they receive.
    """
    sending = [_with_loads_and_sends(codes, actions) for actions in work]
    receive_ahead, all_at_once = RECEIVE_AHEAD, max(map(len, sending))
    while standstill(codes, rows := _with_receives(codes, sending, receive_ahead)):
        if receive_ahead == RECEIVE_AHEAD and standstill(codes, _with_receives(codes, sending, all_at_once)):
            raise ScheduleError(
                "this order of work makes the stages wait for each other, however they receive"
            )
        receive_ahead += 1
    return tuple(map(codes.actions, rows))


def _with_loads_and_sends(codes: Codes, actions: Sequence[int]) -> list[int]:
    row: list[int] = []
    loads: set[int] = set()
    for code in actions:
        op = code % codes.size
        load = code + codes.load[op]
        if load != code and load not in loads:
            loads.add(load)
            row.append(load)
        row.append(code)
        if codes.send[op]:
            row.append(code + codes.send[op])
    return row


def _with_receives(codes: Codes, sending: Sequence[list[int]], receive_ahead: int) -> list[list[int]]:
    """Adds the receives to every row of ``sending``."""
    rows = []
    for stage, row in enumerate(sending):
        for neighbour, kind in ((stage - 1, Kind.SEND_FORWARD), (stage + 1, Kind.SEND_GRADIENT)):
            if 0 <= neighbour < len(sending):
                ops = [codes.receive[n] if op.kind is kind else 0 for n, op in enumerate(codes.ops)]
                receives = [c + ops[c % codes.size] for c in sending[neighbour] if ops[c % codes.size]]
                row = _placed(codes, row, receives, receive_ahead)
        rows.append(row)
    return rows


def _placed(codes: Codes, row: list[int], receives: list[int], receive_ahead: int) -> list[int]:
    """Places ``receives`` in ``row`` in their order, as early as ``receive_ahead`` lets it."""
    taken_at: dict[int, int] = {}
    for position, code in enumerate(row):
        for distance in codes.takes[code % codes.size]:
            taken_at.setdefault(code + distance, position)
    takes = [taken_at[receive] for receive in receives]
    before: dict[int, list[int]] = defaultdict(list)
    latest = len(row)
    for number, receive in reversed(list(enumerate(receives))):
        early = takes[number - receive_ahead] + 1 if number >= receive_ahead else 0
        # No later than its own use, and no later than later receives of the link.
        latest = min(latest, takes[number], early)
        before[latest].append(receive)
    return [c for position, code in enumerate(row) for c in (*reversed(before.get(position, ())), code)]
