"""``interlock.trace``: the batches asked for, of every stage, beside what the simulator makes of them."""

import json
from collections import Counter
from pathlib import Path

import pytest
from engine_jobs import Job, assert_same, is_same, outcomes
from ranks import RankPool

from ds_interlock.schedule import GradientFlowPlan, training_program
from ds_interlock.schedule.action import COMPUTE_KINDS

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
                if e["pid"] == process and e["name"] != "waiting" and e["args"]["batch"] == batch
            ]
            assert Counter(work) == expected, (names[process], batch)
    assert any(e["name"] == "waiting" for e in slices if e["pid"] == 0)
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
