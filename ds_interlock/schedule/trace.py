"""Timelines as a trace in Chrome's format, for https://ui.perfetto.dev or chrome://tracing.

A timeline is a process of the trace, a stage a thread of it, an action a slice, and waiting is a slice
of its own: what a stage does not do is as visible as what it does. Times are microseconds, as the format
has them; a unit other than seconds counts as seconds.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.render import LABELS, Timeline, waits

_MICROSECONDS = 1e6
# Names of the trace viewers' palette.
_COLOURS = {
    Kind.FORWARD: "thread_state_running",
    Kind.HEAD: "thread_state_iowait",
    Kind.INPUT_GRADIENT: "good",
    Kind.WEIGHT_GRADIENT: "thread_state_runnable",
    Kind.BACKWARD: "bad",
    Kind.STEP: "generic_work",
}


def chrome_trace(timelines: Sequence[Timeline], title: str = "Pipeline timeline") -> dict[str, Any]:
    """The JSON object of a trace.

    Args:
        timelines: What to show, each as a process.
        title: Stored as the trace's name.

    Returns:
        ``{"traceEvents": [...], ...}``, for ``json.dump``.
    """
    events = [event for number, timeline in enumerate(timelines) for event in _events(number, timeline)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": title}}


def _events(process: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield _name("process_name", process, 0, timeline.name)
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
    starts = [span.start for row in timeline.rows for span in row]
    ends = [span.end for row in timeline.rows for span in row]
    begin, end = min(starts, default=0.0), max(ends, default=0.0)
    for stage, row in enumerate(timeline.rows):
        yield _name("thread_name", process, stage, f"stage {stage}")
        for span in row:
            details = {
                "action": str(span.action),
                "batch": span.batch,
                "micro_batch": span.action.micro_batch,
                "losses": list(span.action.losses),
            }
            slice_ = _slice(process, stage, LABELS[span.action.kind], span.start - begin, span.end - begin)
            yield slice_ | {"args": details, "cat": "work", "cname": _COLOURS[span.action.kind]}
        for start, stop in waits(row, begin, end):
            yield _slice(process, stage, "waiting", start - begin, stop - begin) | {
                "cat": "wait",
                "cname": "grey",
            }


def _slice(process: int, stage: int, name: str, start: float, end: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": stage,
        "ts": start * _MICROSECONDS,
        "dur": (end - start) * _MICROSECONDS,
    }


def _name(kind: str, process: int, stage: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": stage, "args": {"name": name}}
