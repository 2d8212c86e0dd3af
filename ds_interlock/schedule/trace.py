"""Timelines as a trace in Chrome's format, for https://ui.perfetto.dev or chrome://tracing.

A timeline is a process of the trace, a stage a thread of it, an action a slice, and waiting is a slice
of its own: what a stage does not do is as visible as what it does. Times are microseconds, as the format
has them; a unit other than seconds counts as seconds.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.render import LABELS, Timeline, last_end, waits
from ds_interlock.schedule.simulate import from_zero

_MICROSECONDS = 1e6
# Names of the trace viewers' palette.
_COLOURS = {
    Kind.FORWARD: "thread_state_running",
    Kind.HEAD: "thread_state_iowait",
    Kind.INPUT_GRADIENT: "good",
    Kind.WEIGHT_GRADIENT: "thread_state_runnable",
    Kind.BACKWARD: "bad",
    Kind.STEP: "generic_work",
    Kind.LOAD: "terrible",
}


def chrome_trace(timelines: Sequence[Timeline], title: str = "Pipeline timeline") -> dict[str, Any]:
    """The trace of ``timelines``, a process each, as an object for ``json.dump``."""
    events = [event for number, timeline in enumerate(timelines) for event in _events(number, timeline)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": title}}


def _events(process: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    rows = from_zero(timeline.rows)
    yield _name("process_name", process, 0, timeline.name)
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
    for stage, row in enumerate(rows):
        yield _name("thread_name", process, stage, f"stage {stage}")
        for span in row:
            kind = span.action.kind
            details = {
                "action": str(span.action),
                "batch": span.batch,
                "micro_batch": span.action.micro_batch,
                "losses": list(span.action.losses),
            }
            category = "wait" if kind is Kind.LOAD else "work"
            more = {"args": details, "cat": category, "cname": _COLOURS[kind]}
            yield _slice(process, stage, LABELS[kind], span.start, span.end) | more
        for start, end in waits(row, last_end(rows)):
            yield _slice(process, stage, "waiting", start, end) | {"cat": "wait", "cname": "grey"}


def _slice(process: int, stage: int, name: str, start: float, end: float) -> dict[str, Any]:
    times = {"ts": start * _MICROSECONDS, "dur": (end - start) * _MICROSECONDS}
    return {"ph": "X", "name": name, "pid": process, "tid": stage, **times}


def _name(kind: str, process: int, stage: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": stage, "args": {"name": name}}
