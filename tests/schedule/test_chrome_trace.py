"""A timeline as a Chrome trace."""

from ds_interlock.schedule import Timeline
from ds_interlock.schedule.action import Action
from ds_interlock.schedule.simulate import Span
from ds_interlock.schedule.trace import chrome_trace

ROWS = (
    (Span(Action.parse("0F0"), 0, 1.0, 1.5), Span(Action.parse("0W0"), 0, 3.0, 4.0)),
    (Span(Action.parse("1F0"), 0, 1.5, 2.0), Span(Action.parse("1H0@0"), 0, 2.0, 2.25)),
)


def slices(trace: dict) -> list[tuple]:
    return sorted(
        (e["pid"], e["tid"], e["ts"], e["dur"], e["name"]) for e in trace["traceEvents"] if e["ph"] == "X"
    )


def test_work_and_waiting_are_slices_in_microseconds_from_the_first_start():
    trace = chrome_trace([Timeline("measured", "s", ROWS)], title="a run")
    assert slices(trace) == [
        (0, 0, 0.0, 0.5e6, "forward"),
        (0, 0, 0.5e6, 1.5e6, "waiting"),
        (0, 0, 2.0e6, 1.0e6, "weight gradient"),
        (0, 1, 0.0, 0.5e6, "waiting"),
        (0, 1, 0.5e6, 0.5e6, "forward"),
        (0, 1, 1.0e6, 0.25e6, "head"),
        (0, 1, 1.25e6, 1.75e6, "waiting"),
    ]
    assert trace["otherData"] == {"title": "a run"}


def test_each_timeline_is_a_process_and_each_stage_a_thread():
    trace = chrome_trace([Timeline("measured", "s", ROWS), Timeline("simulated", "s", ROWS)])
    named = {
        (e["name"], e["pid"], e["tid"]): e["args"]["name"]
        for e in trace["traceEvents"]
        if e["ph"] == "M" and "name" in e["args"]
    }
    assert named == {
        ("process_name", 0, 0): "measured",
        ("thread_name", 0, 0): "stage 0",
        ("thread_name", 0, 1): "stage 1",
        ("process_name", 1, 0): "simulated",
        ("thread_name", 1, 0): "stage 0",
        ("thread_name", 1, 1): "stage 1",
    }


def test_a_slice_says_which_action_it_was():
    (head,) = [e for e in chrome_trace([Timeline("t", "s", ROWS)])["traceEvents"] if e.get("name") == "head"]
    assert head["args"] == {"action": "1H0@0", "batch": 0, "micro_batch": 0, "losses": [0]}
