"""Plays a program through under a cost model: how long a batch takes, and where the time goes.

Every stage runs its actions in order. A compute action starts when the receives it needs are complete.
A message starts once it is sent, its receive is posted and the link is free, and takes ``latency +
bytes / bandwidth``. A send does not keep its stage, unless ``send_ahead`` earlier messages are still on
their way; with ``send_ahead=0`` every send waits for its own arrival (rendezvous), the hardest test of
whether a program can come to a standstill.

When streaming, a stage starts the next batch as soon as it has stepped; otherwise all stages wait for
the last at the end of every batch.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import COMPUTE_KINDS, RECV_KINDS, SEND_KINDS, Action, Kind
from ds_interlock.schedule.cost import CostModel, LinkTimes
from ds_interlock.schedule.lower import Program, micro_batch_starts, receive_of, receives_needed

SEND_AHEAD = 2
"""Messages of one link that may be on their way before the sending stage waits."""


class StandstillError(ScheduleError):
    """The stages wait for each other, each at one of ``places`` (stage, position in its list)."""

    def __init__(self, places: Sequence[tuple[int, int]], program: Program) -> None:
        self.places = tuple(places)
        waiting = ", ".join(str(program.stages[stage][position]) for stage, position in places)
        super().__init__(f"the stages wait for each other: none of {waiting} can start")


@dataclass(frozen=True)
class Span:
    """When an action ran, and in which batch."""

    action: Action
    batch: int
    start: float
    end: float


Rows = tuple[tuple[Span, ...], ...]
"""For each stage its spans."""


def from_zero(rows: Sequence[Sequence[Span]], first: int = 0) -> Rows:
    """``rows`` in time since the first span began, with batch ``first`` numbered 0."""
    begin = min((span.start for row in rows for span in row), default=0.0)

    def moved(span: Span) -> Span:
        return Span(span.action, span.batch - first, span.start - begin, span.end - begin)

    return tuple(tuple(map(moved, row)) for row in rows)


@dataclass(frozen=True)
class Simulation:
    """What came out."""

    spans: Rows  # of the compute actions, over all batches
    batch_seconds: float  # once the pipeline is running
    bubble_fraction: float  # share of the stages' time, over those batches, in which they wait
    in_flight: tuple[int, ...]  # by stage: most micro-batches it held activations of at once
    relay_bytes: tuple[float, ...]  # by stage: gradients it sends upstream in one batch


def simulate(
    program: Program,
    costs: CostModel | None = None,
    *,
    num_batches: int = 4,
    streaming: bool = True,
    send_ahead: int = SEND_AHEAD,
) -> Simulation:
    """Plays ``num_batches`` batches of ``program`` through.

    Args:
        program: What the stages do.
        costs: How long it takes them; by default a forward is 1.
        num_batches: Batches to play, at least 1. The first fills the pipeline; times are taken from the
            others, or from the first if it is the only one.
        streaming: Whether stages may run ahead into the next batch.
        send_ahead: See above.

    Raises:
        ScheduleError: If the stages come to a standstill (StandstillError), or for no batches.
    """
    if num_batches < 1:
        raise ScheduleError(f"num_batches is {num_batches}: a simulation plays at least 1 batch")
    player = _Player(program, costs or CostModel(), send_ahead)
    ends = [[0.0] * program.plan.num_stages]
    for batch in range(num_batches):
        player.play(batch)
        if not streaming:
            player.clocks = [max(player.clocks)] * len(player.clocks)
        ends.append(list(player.clocks))
    # The slowest stage sets the pace; the first batch only fills the pipeline.
    first = min(1, num_batches - 1)
    spent = [end - start for start, end in zip(ends[first], ends[-1], strict=True)]
    seconds = max(spent) / (num_batches - first)
    busy = sum(span.end - span.start for spans in player.spans for span in spans) / num_batches
    total = seconds * program.plan.num_stages
    return Simulation(
        spans=tuple(map(tuple, player.spans)),
        batch_seconds=seconds,
        bubble_fraction=max(0.0, 1.0 - busy / total) if total else 0.0,
        in_flight=tuple(
            max((1 + len(live) for _, live in micro_batch_starts(actions)), default=0)
            for actions in program.stages
        ),
        relay_bytes=tuple(
            sum(player.costs.message_bytes(a) for a in actions if a.kind is Kind.SEND_GRADIENT)
            for actions in program.stages
        ),
    )


class _Player:
    """The state of all stages and links while a program is played through."""

    def __init__(self, program: Program, costs: CostModel, send_ahead: int) -> None:
        self.program = program
        self.costs = costs
        self.send_ahead = send_ahead
        self.clocks = [0.0] * program.plan.num_stages
        self.spans: list[list[Span]] = [[] for _ in program.stages]
        self.needs = [
            [receives_needed(program.plan, action) for action in actions] for actions in program.stages
        ]
        self.links = LinkTimes(costs)
        # For each link and message the time it arrives, None while it is on its way.
        self.arrivals: dict[tuple[int, Kind], list[float | None]] = defaultdict(list)

    def play(self, batch: int) -> None:
        """One batch: every stage runs until it is blocked, as long as anything moves."""
        # By the receive: the send, when it was ready, and its number on the link.
        self.sent: dict[Action, tuple[Action, float, int]] = {}
        self.posted: dict[Action, float] = {}
        self.arrived: dict[Action, float] = {}
        next_up = [0] * len(self.clocks)
        moved = True
        while moved:
            moved = False
            for stage, actions in enumerate(self.program.stages):
                while next_up[stage] < len(actions) and self._run(stage, next_up[stage], batch):
                    next_up[stage] += 1
                    moved = True
        stuck = [stage for stage, at in enumerate(next_up) if at < len(self.program.stages[stage])]
        if stuck:
            raise StandstillError([(stage, next_up[stage]) for stage in stuck], self.program)

    def _run(self, stage: int, position: int, batch: int) -> bool:
        """Runs one action if it can start; returns whether it did."""
        action = self.program.stages[stage][position]
        if action.kind in SEND_KINDS:
            return self._send(action)
        if action.kind in RECV_KINDS:
            self.posted[action] = self.clocks[stage]
            self._deliver(action)
            return True
        needs = self.needs[stage][position]
        if any(receive not in self.arrived for receive in needs):
            return False
        start = max([self.clocks[stage], *(self.arrived[receive] for receive in needs)])
        self.clocks[stage] = start + self.costs.seconds(self.program.plan, action)
        if action.kind in COMPUTE_KINDS:
            self.spans[stage].append(Span(action, batch, start, self.clocks[stage]))
        return True

    def _send(self, action: Action) -> bool:
        link = action.stage, action.kind
        receive = receive_of(action)
        if receive not in self.sent:
            self.sent[receive] = action, self.clocks[action.stage], len(self.arrivals[link])
            self.arrivals[link].append(None)
            self._deliver(receive)
        waits_for = self.sent[receive][2] - self.send_ahead
        if waits_for >= 0:
            arrival = self.arrivals[link][waits_for]
            if arrival is None:
                return False
            self.clocks[action.stage] = max(self.clocks[action.stage], arrival)
        return True

    def _deliver(self, receive: Action) -> None:
        """Once a message is both sent and waited for, it takes its time on the link."""
        if receive not in self.sent or receive not in self.posted:
            return
        send, sent, number = self.sent[receive]
        arrival = self.links.arrival(send, max(sent, self.posted[receive]))
        self.arrivals[send.stage, send.kind][number] = arrival
        self.arrived[receive] = arrival
