"""``interlock.trace``: the batches asked for, of every stage, beside what the simulator makes of them."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_jobs import Job, MicroBatch, assert_same, data_for, is_same, make_engine, outcomes
from ranks import RankPool

from ds_interlock.schedule import GradientFlowPlan, training_program
from ds_interlock.schedule.action import COMPUTE_KINDS, Kind

WINDOW_2 = {"mode": "interlock", "window": 2}


def traced(section: dict, path: Path, batches: list[int]) -> dict:
    return {**section, "trace": {"path": str(path), "batches": batches}}


@pytest.mark.parametrize("section", [WINDOW_2, {"mode": "global"}], ids=["window 2", "global"])
def test_a_trace_holds_what_every_stage_did_in_the_batches_asked_for(
    ranks4: RankPool, tmp_path: Path, section
):
    path = tmp_path / "traces" / "run"
    plain = Job(section, num_batches=4)
    with_trace = plain.but(section=traced(section, path, [2, 3]))
    first, second = outcomes(ranks4, plain, with_trace)
    assert_same(first, second)  # recording changes no number
    assert not is_same(first, outcomes(ranks4, plain.but(num_batches=3))[0])

    trace = json.loads(path.with_name("run.json").read_text())
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert list(names.values()) == ["measured", "simulated, at the costs measured"]
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    plan = GradientFlowPlan.n_wise(4, 2) if section is WINDOW_2 else GradientFlowPlan.end_to_end(4)
    program = training_program(plan, plain.num_micro_batches)
    expected = Counter(
        str(action) for actions in program.stages for action in actions if action.kind in COMPUTE_KINDS
    )
    for process in names:
        for batch in (0, 1):
            work = [
                e["args"]["action"]
                for e in slices
                if e["pid"] == process and e["cat"] == "work" and e["args"]["batch"] == batch
            ]
            assert Counter(work) == expected, (names[process], batch)
    assert any(e["name"] == "waiting" for e in slices if e["pid"] == 0)
    loads = [e for e in slices if e["name"] == "waiting for data"]
    assert {(e["pid"], e["tid"], e["cat"]) for e in loads} == {(0, 0, "wait")}, "stage 0 reads"
    assert len(loads) == 2 * plain.num_micro_batches
    svg = path.with_name("run.svg").read_text()
    assert "measured" in svg
    assert "simulated" in svg


def test_a_run_that_ends_too_early_writes_nothing(ranks4: RankPool, tmp_path: Path):
    job = Job(traced(WINDOW_2, tmp_path / "run", [2, 9]), num_batches=3)
    outcomes(ranks4, job)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_does_not_end_the_training(ranks4: RankPool, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    job = Job(traced(WINDOW_2, tmp_path / "file" / "run", [1, 1]), num_batches=2)
    (one,) = outcomes(ranks4, job)
    (other,) = outcomes(ranks4, Job(WINDOW_2, num_batches=2))
    assert_same(one, other)


READING_SECONDS = 0.05


def train_on_slow_data(job: Job, path: str) -> list[float]:
    """How long this stage waited for each micro-batch."""
    engine = make_engine(job)
    engine.record_timeline()
    engine.train_batch(slowly(data_for(engine, job)))
    row = engine._recorder._recordings["timeline"]
    waits = [span.end - span.start for span in row if span.action.kind is Kind.LOAD]
    engine.write_timeline(path)
    engine.drain()
    return waits


def slowly(data: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    for pair in data:
        time.sleep(READING_SECONDS)
        yield pair


def test_slow_data_is_visible_as_waiting(ranks2: RankPool, tmp_path: Path):
    path, job = tmp_path / "timeline.svg", Job(WINDOW_2, num_stages=2, num_micro_batches=3)
    first, second = ranks2.run(train_on_slow_data, job=job, path=str(path))
    assert len(first) == 3
    assert min(first) >= READING_SECONDS
    assert second == []
    assert path.read_text().count('class="load"') == 4, "three boxes and the legend"
