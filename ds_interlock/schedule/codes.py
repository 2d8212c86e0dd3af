"""The actions of a plan as numbers. What an action needs and sends is worked out once, for one micro-batch.

The code of an action is ``micro_batch * size + op``, where ``op`` is its place in ``ops``. What belongs to an
action, as a receive belongs to a send, is at the same distance from it for every micro-batch. Programs are
ordered, lowered, verified and simulated in codes: they may have millions of actions.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import RECV_KINDS, Action, Kind
from ds_interlock.schedule.dependency import (
    batch_end,
    dependencies,
    is_work,
    receive_of,
    receives_needed,
    send_of,
    stage_actions,
)
from ds_interlock.schedule.plan import GradientFlowPlan


class Codes:
    """The codes of the actions of ``plan``. Distances are by op; 0 where there is nothing.

    Attributes:
        ops: Every action, communication included, of micro-batch 1.
        size: Their number.
        needs: Distances to the ``dependencies``. Itself for the micro-batch before is at ``-size``.
        takes: Distances to the receives whose messages are needed.
        load: Distance to the load that is needed.
        send: Distance to the send of what is made.
        receive: Of a send, distance to the receive at its other end.
        is_receive, is_work: By op.
    """

    def __init__(self, plan: GradientFlowPlan) -> None:
        self.plan, stages = plan, range(plan.num_stages)
        work = [action for stage in stages for action in stage_actions(plan, stage, 1)]
        sends = {action: send for action in work if (send := send_of(plan, action)) is not None}
        pairs = {send: receive_of(send) for send in sends.values()}
        load, ends = Action(0, Kind.LOAD, 1), [end for stage in stages for end in batch_end(stage, 1)]
        self.ops = sorted({*work, *pairs.keys(), *pairs.values(), load, *ends})
        self.size = len(self.ops)
        self._op = {(op.stage, op.kind, op.losses): number for number, op in enumerate(self.ops)}
        loads = {op: load for op in work if op.stage == 0 and op.kind is Kind.FORWARD}
        self.load, self.send, self.receive = (
            [self.of(others[op]) - self.of(op) if op in others else 0 for op in self.ops]
            for others in (loads, sends, pairs)
        )
        self.needs, self.takes = (
            [
                tuple(self.of(needed) - self.of(op) for needed in needs(plan, op)) if is_work(op) else ()
                for op in self.ops
            ]
            for needs in (dependencies, receives_needed)
        )
        self.is_receive = [op.kind in RECV_KINDS for op in self.ops]
        self.is_work = list(map(is_work, self.ops))

    def find(self, action: Action) -> int | None:
        """The code of ``action``, None if the plan has no such action."""
        op = self._op.get((action.stage, action.kind, action.losses))
        return None if op is None else action.micro_batch * self.size + op

    def of(self, action: Action) -> int:
        """The code of ``action``; a ScheduleError if the plan has no such action."""
        code = self.find(action)
        if code is None:
            raise ScheduleError(f"{action} is not work of the plan")
        return code

    def action(self, code: int) -> Action:
        """The action with this code."""
        return self.actions([code])[0]

    def actions(self, codes: Iterable[int]) -> tuple[Action, ...]:
        """The actions with these codes."""
        size, ops = self.size, self.ops
        likes = ((ops[code % size], code // size) for code in codes)
        return tuple(Action(like.stage, like.kind, number, like.losses) for like, number in likes)

    def received(self, action: Action) -> tuple[Action, ...]:
        """As ``receives_needed``."""
        code = self.of(action)
        return self.actions(code + distance for distance in self.takes[code % self.size])

    def micro_batch_starts(self, row: Iterable[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Of a stage's work the first of each micro-batch, and those of the micro-batches then in flight."""
        work = [code for code in row if self.is_work[code % self.size]]
        last = {code // self.size: code for code in work}
        live: dict[int, int] = {}
        for code in work:
            micro_batch = code // self.size
            if micro_batch not in live:
                yield code, tuple(live.values())
                live[micro_batch] = code
            if last[micro_batch] == code:
                del live[micro_batch]


codes_of = lru_cache(maxsize=16)(Codes)
"""``Codes(plan)``, made once."""
