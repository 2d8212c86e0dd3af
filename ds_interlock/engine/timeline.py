"""When each stage did what: recorded on the ranks, shown beside the same batches as simulated.

``Recorder`` notes the times of this stage. ``gather`` collects those of all stages at once; ``Tracer``
those of some batches during the training: every stage leaves its own in the job's store, and a thread of rank
0 writes the files. No stage waits for that.
"""

import json
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from typing import Any

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from ds_interlock.config.parts import TraceConfig
from ds_interlock.engine.instructions import TIMERS
from ds_interlock.engine.reports import job_store
from ds_interlock.files import replace_text
from ds_interlock.schedule.action import COMPUTE_KINDS, Action, Kind
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.render import Timeline, render_svg
from ds_interlock.schedule.simulate import Rows, Span, from_zero, simulate
from ds_interlock.schedule.trace import chrome_trace
from ds_interlock.transport import agreement
from ds_interlock.transport.ranks import StageRanks

_TRACE = "interlock.trace"
_RECORDED = COMPUTE_KINDS | {Kind.LOAD}
_FINAL = "final head"
_WHOLE = CostModel(input_gradient=1.0)
"""Says what share of its stage a relay crosses."""


class Recorder:
    """Notes start and end of this stage's actions for as many recordings as are under way.

    With ``timers``, DeepSpeed's, it also runs those that DeepSpeed prints under ``wall_clock_breakdown``.
    """

    def __init__(self, synchronize: Callable[[], None], timers: Any = None) -> None:
        self.batch = 0
        """Training batches so far: the number of the one that actions belong to."""
        self._synchronize = synchronize  # an accelerator works on after its calls have returned
        self._timers = timers
        self._recordings: dict[str, list[Span]] = {}

    def start(self, name: str) -> None:
        """Begins the recording ``name``, again if it was begun before."""
        self._recordings[name] = []

    def stop(self, name: str) -> list[Span]:
        """Ends the recording ``name`` and returns it; empty if it was never begun."""
        return self._recordings.pop(name, [])

    def forget(self) -> None:
        """Empties all recordings that are under way."""
        for spans in self._recordings.values():
            spans.clear()

    @contextmanager
    def span(self, action: Action) -> Iterator[None]:
        """Records the time its body takes as the time of ``action``."""
        timers = [self._timers(name) for name in TIMERS.get(action.kind, ())] if self._timers else []
        for timer in timers:
            timer.start()
        # Wall-clock time, so that the rows of ranks on one machine can be laid over each other.
        start = time.time()
        yield
        for timer in timers:
            timer.stop()
        if not self._recordings or action.kind not in _RECORDED:
            return
        self._synchronize()
        span = Span(action, self.batch, start, time.time())
        for spans in self._recordings.values():
            spans.append(span)


def gather(spans: list[Span], stage: int, num_stages: int) -> Rows:
    """The spans of all stages, in seconds since the first began. A collective call."""
    rows: list[list[Span]] = [[] for _ in range(num_stages)]
    for owner, recorded in agreement.gather((stage, spans)):
        rows[owner] = rows[owner] or recorded  # one data-parallel replica stands for all
    return from_zero(rows)


def measured_costs(plan: GradientFlowPlan, rows: Rows) -> CostModel:
    """The costs that ``rows`` were run at: for each stage the median of each kind of action.

    A stage that relays nothing does not show what its input gradient costs: half a backward pass is taken.
    """
    stages = [_median_seconds(plan, row) for row in rows]
    backward = [of[Kind.WEIGHT_GRADIENT] or of[Kind.BACKWARD] for of in stages]
    relay = [min(of[Kind.INPUT_GRADIENT] or b / 2, b) for of, b in zip(stages, backward, strict=True)]
    return CostModel(
        forward=[of[Kind.FORWARD] for of in stages],
        input_gradient=relay,
        weight_gradient=[whole - part for whole, part in zip(backward, relay, strict=True)],
        head=[of[Kind.HEAD] for of in stages],
        final_head=max(of[_FINAL] for of in stages),  # of the last stage
        optimizer=[of[Kind.STEP] for of in stages],
    )


def _median_seconds(plan: GradientFlowPlan, row: Sequence[Span]) -> dict[str, float]:
    """The median time of each kind of action of a stage, of the final head apart; 0 without any."""
    seconds: dict[str, dict[Any, float]] = defaultdict(lambda: defaultdict(float))
    for span in row:
        action, took = span.action, span.end - span.start
        kind = _FINAL if action.kind is Kind.HEAD and action.losses == (plan.final,) else action.kind
        if kind is Kind.INPUT_GRADIENT:  # from a head within the stage, a part of it
            took /= _WHOLE.seconds(plan, action)
        losses = () if kind is Kind.FORWARD else action.losses  # a forward comes in parts
        seconds[kind][span.batch, action.micro_batch, losses] += took
    medians = {kind: statistics.median(times.values()) for kind, times in seconds.items()}
    return defaultdict(float, medians)


def measured_and_simulated(program: Program, rows: Rows, *, streaming: bool) -> list[Timeline]:
    """The batches in ``rows``, and as many as simulated in the running pipeline at the costs measured."""
    batches = {span.batch for span in chain.from_iterable(rows)}
    first = program.plan.num_stages if streaming else 1  # until then the pipeline fills
    costs = measured_costs(program.plan, rows)
    simulation = simulate(program, costs, num_batches=first + len(batches), streaming=streaming)
    simulated = [[span for span in row if span.batch >= first] for row in simulation.spans]
    return [
        Timeline("measured", "s", from_zero(rows, min(batches))),
        Timeline("simulated, at the costs measured", "s", from_zero(simulated, first)),
    ]


def _title(program: Program) -> str:
    return f"{program.num_micro_batches} micro-batches per batch on {program.plan.num_stages} stages"


def draw(program: Program, rows: Rows, *, streaming: bool) -> str:
    """An SVG of a typical batch in ``rows`` above the same batch as simulated at the costs measured.

    On cores that processes share, one batch alone may take twice as long as the others.
    """
    num_batches = len({span.batch for span in chain.from_iterable(rows)})
    typical = typical_batch(rows)
    one = tuple(tuple(span for span in row if span.batch == typical) for row in rows)
    measured, simulated = measured_and_simulated(program, one, streaming=streaming)
    name = f"measured: the median of {num_batches} batches{_sharing()}"
    return render_svg([replace(measured, name=name), simulated], title=_title(program))


def typical_batch(rows: Rows) -> int:
    """The batch of median duration, from its first span to its last."""
    times: dict[int, list[float]] = defaultdict(list)
    for span in chain.from_iterable(rows):
        times[span.batch] += span.start, span.end
    by_duration = sorted(times, key=lambda batch: max(times[batch]) - min(times[batch]))
    return by_duration[(len(by_duration) - 1) // 2]


def _sharing() -> str:
    """On CPU how many processes share how many cores; empty on a device of each rank's own."""
    if get_accelerator().device_name() != "cpu":
        return ""
    num_ranks = int(os.environ.get("LOCAL_SIZE") or dist.get_world_size())  # the launcher sets the first
    return f", {num_ranks} processes on {len(os.sched_getaffinity(0))} cores"


@dataclass
class Tracer:
    """Records the batches that ``interlock.trace`` names. Every rank of the job must make one."""

    config: TraceConfig
    recorder: Recorder
    ranks: StageRanks
    timeout_seconds: float

    def __post_init__(self) -> None:
        self._store = job_store(waits=True)
        self._thread: threading.Thread | None = None

    def batch_begins(self, batch: int) -> None:
        """Before every training batch, counted from 1."""
        if batch == self.config.batches[0]:
            self.recorder.start(_TRACE)

    def batch_is_done(self, batch: int, program: Program, *, streaming: bool) -> None:
        """After every training batch: collects the recording after the last one."""
        if batch == self.config.batches[1]:
            spans = self.recorder.stop(_TRACE)
            self._thread = threading.Thread(
                target=self._finish, args=(spans, program, streaming), name=_TRACE, daemon=True
            )
            self._thread.start()

    def flush(self) -> None:
        """Waits until the recording is in the store and, on the rank that writes, in the files."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Warns if the run ended too early for the recording."""
        if self._thread is None and self.ranks.global_rank == 0:
            logger.warning(
                "interlock.trace: the run ended before batch %d, the last one to record; nothing was written",
                self.config.batches[1],
            )

    def _finish(self, spans: Sequence[Span], program: Program, streaming: bool) -> None:
        try:
            if self.ranks.speaks_for_stage:
                row = [[str(span.action), span.batch, span.start, span.end] for span in spans]
                self._store.set(str(self.ranks.stage), json.dumps(row))
            if self.ranks.global_rank == 0:
                timelines = measured_and_simulated(program, self._collect(), streaming=streaming)
                trace = chrome_trace(timelines, _title(program))
                replace_text(f"{self.config.path}.json", json.dumps(trace))
                replace_text(f"{self.config.path}.svg", render_svg(timelines, _title(program)))
        except (OSError, RuntimeError, ValueError) as error:  # a picture must not end the training
            logger.warning("interlock.trace: nothing was written to %s: %s", self.config.path, error)

    def _collect(self) -> Rows:
        stages = [str(stage) for stage in range(self.ranks.num_stages)]
        self._store.wait(stages, timedelta(seconds=self.timeout_seconds))
        rows = [json.loads(self._store.get(stage)) for stage in stages]
        return from_zero([[Span(Action.parse(text), *times) for text, *times in row] for row in rows])
