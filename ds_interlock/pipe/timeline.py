"""When each stage did what: recorded on the ranks, drawn beside what the simulator makes of it."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist

from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.render import Timeline, render_svg
from ds_interlock.schedule.simulate import Span, simulate

Rows = tuple[tuple[Span, ...], ...]
"""For each stage its spans, in seconds."""


class Recorder:
    """Notes start and end of this stage's actions while it is switched on."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize  # an accelerator works on after its calls have returned
        self._on = False
        self._spans: list[Span] = []

    def start(self) -> None:
        """Forgets what was recorded and records from now on."""
        self._spans = []
        self._on = True

    def stop(self) -> None:
        """Records no more."""
        self._on = False

    @contextmanager
    def span(self, action: Action, batch: int) -> Iterator[None]:
        """Records the time its body takes as the time of ``action``."""
        if not self._on:
            yield
            return
        # Wall-clock time, so that the rows of ranks on one machine can be laid over each other.
        start = time.time()
        yield
        self.synchronize()
        self._spans.append(Span(action, batch, start, time.time()))

    def gather(self, stage: int, num_stages: int) -> Rows:
        """Everybody's spans, in seconds since the first began. A collective call."""
        gathered: list[tuple[int, list[Span]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (stage, self._spans))
        rows: list[list[Span]] = [[] for _ in range(num_stages)]
        for entry in gathered:
            assert entry is not None
            owner, spans = entry
            rows[owner] = rows[owner] or spans  # one data-parallel replica stands for all
        return _from_zero(rows)


def measured_costs(rows: Rows) -> CostModel:
    """The costs that ``rows`` were run at: for each stage the median of each kind of action.

    A stage that relays nothing does not show what its input gradient costs alone; half of a
    backward pass is taken for it.
    """
    forward, relay, backward, head, step = [], [], [], [], []
    for row in rows:
        seconds: dict[Kind, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for span in row:
            # A forward may come in parts, and a stage may have two heads.
            seconds[span.action.kind][span.action.micro_batch] += span.end - span.start
        forward.append(_median(seconds[Kind.FORWARD]))
        backward.append(_median(seconds[Kind.WEIGHT_GRADIENT]) or _median(seconds[Kind.BACKWARD]))
        relay.append(min(_median(seconds[Kind.INPUT_GRADIENT]) or backward[-1] / 2, backward[-1]))
        head.append(_median(seconds[Kind.HEAD]))
        step.append(_median(seconds[Kind.STEP]))
    return CostModel(
        forward=forward,
        input_gradient=relay,
        weight_gradient=[whole - part for whole, part in zip(backward, relay, strict=True)],
        head=head,
        final_head=head[-1],
        optimizer=step,
    )


def draw(program: Program, rows: Rows, *, streaming: bool) -> str:
    """An SVG of the newest batch in ``rows`` above the same batch as simulated at the costs measured."""
    newest = max((span.batch for row in rows for span in row), default=0)
    measured = _batch(rows, newest)
    simulation = simulate(program, measured_costs(measured), num_batches=3, streaming=streaming)
    return render_svg(
        [
            Timeline("measured", "s", measured),
            Timeline("simulated, at the costs measured", "s", _batch(simulation.spans, 2)),
        ],
        title=f"One batch: {program.num_micro_batches} micro-batches on {program.plan.num_stages} stages",
    )


def _batch(rows: Rows, batch: int) -> Rows:
    """One batch out of ``rows``, told as if it were the first."""
    return _from_zero([[replace(span, batch=0) for span in row if span.batch == batch] for row in rows])


def _from_zero(rows: list[list[Span]]) -> Rows:
    begin = min((span.start for row in rows for span in row), default=0.0)
    return tuple(tuple(replace(s, start=s.start - begin, end=s.end - begin) for s in row) for row in rows)


def _median(by_micro_batch: dict[int, float]) -> float:
    return statistics.median(by_micro_batch.values()) if by_micro_batch else 0.0
