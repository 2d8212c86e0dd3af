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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import COMPUTE_KINDS, Action, Kind
from ds_interlock.schedule.codes import codes_of
from ds_interlock.schedule.cost import CostModel, LinkTimes
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.standstill import StandstillError

SEND_AHEAD = 2
"""Messages of one link that may be on their way before the sending stage waits."""


class Span(NamedTuple):
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
            max((1 + len(live) for _, live in player.codes.micro_batch_starts(row)), default=0)
            for row in player.rows
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
        self.codes = codes = codes_of(program.plan)
        self.rows = [list(map(codes.of, actions)) for actions in program.stages]
        self.seconds = [costs.seconds(program.plan, op) for op in codes.ops]
        self.has_span = [op.kind in COMPUTE_KINDS for op in codes.ops]
        self.clocks = [0.0] * program.plan.num_stages
        self.spans: list[list[Span]] = [[] for _ in program.stages]
        self.links = LinkTimes(costs)
        # For each link and message the time it arrives, None while it is on its way; by the op of a send.
        links: dict[tuple[int, Kind], list[float | None]] = defaultdict(list)
        self.arrivals = [links[op.stage, op.kind] for op in codes.ops]

    def play(self, batch: int) -> None:
        """One batch: every stage runs until it is blocked, as long as anything moves."""
        # By the receive: the send's op, when it was ready, and its number on the link.
        self.sent: dict[int, tuple[int, float, int]] = {}
        self.posted: dict[int, float] = {}
        self.arrived: dict[int, float] = {}
        next_up, before = [0] * len(self.rows), None
        while next_up != before:
            before = next_up
            next_up = [self._run(stage, position, batch) for stage, position in enumerate(before)]
        stuck = [(stage, at) for stage, at in enumerate(next_up) if at < len(self.rows[stage])]
        if stuck:
            raise StandstillError(stuck, self.program.stages)

    def _run(self, stage: int, start: int, batch: int) -> int:
        """Runs a stage from position ``start`` to the first action that cannot start, and returns that."""
        row, clock, spans = self.rows[stage], self.clocks[stage], self.spans[stage]
        actions, seconds, has_span = self.program.stages[stage], self.seconds, self.has_span
        codes = self.codes
        size, receive, is_receive, takes = codes.size, codes.receive, codes.is_receive, codes.takes
        for position in range(start, len(row)):
            code = row[position]
            op = code % size
            begin: float | None = clock
            if receive[op]:
                begin = self._send(op, code + receive[op], clock)
            elif is_receive[op]:
                self.posted[code] = clock
                if code in self.sent:
                    self._deliver(code)
            elif takes[op]:
                begin = self._taken(code, takes[op], clock)
            if begin is None:
                break
            clock = begin + seconds[op]
            if has_span[op]:
                spans.append(Span(actions[position], batch, begin, clock))
        else:
            position = len(row)
        self.clocks[stage] = clock
        return position

    def _taken(self, code: int, takes: Iterable[int], clock: float) -> float | None:
        """When all messages that ``code`` takes have arrived, None if that is not known."""
        for distance in takes:
            arrival = self.arrived.get(code + distance)
            if arrival is None:
                return None
            clock = max(clock, arrival)
        return clock

    def _send(self, op: int, receive: int, clock: float) -> float | None:
        """Sends the message of ``receive``; returns when its stage may go on, None if that is not known."""
        arrivals = self.arrivals[op]
        if receive not in self.sent:
            self.sent[receive] = op, clock, len(arrivals)
            arrivals.append(None)
            if receive in self.posted:
                self._deliver(receive)
        waits_for = self.sent[receive][2] - self.send_ahead
        if waits_for < 0:
            return clock
        arrival = arrivals[waits_for]
        return None if arrival is None else max(clock, arrival)

    def _deliver(self, receive: int) -> None:
        """Now that a message is both sent and waited for, it takes its time on the link."""
        op, sent, number = self.sent[receive]
        arrival = self.links.arrival(self.codes.ops[op], max(sent, self.posted[receive]))
        self.arrivals[op][number] = self.arrived[receive] = arrival
