"""A program that could hang, or that does not do what its plan says, is refused before it runs."""

from dataclasses import replace
from typing import Any

import pytest
from engine_jobs import Job, make_engine, make_module, micro_batches
from ranks import RankPool, caught

from ds_interlock import GradientFlowPlan, ScheduleError
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.lower import Program

PHASES = [{"from_step": 0, "window": 2}, {"from_step": 2, "window": 1}]


def without_receives(program: Program) -> Program:
    stages = tuple(tuple(a for a in row if a.kind is not Kind.RECV_FORWARD) for row in program.stages)
    return replace(program, stages=stages)


def refused_at_start(job: Job, faulty_window: float) -> Exception | None:
    import ds_interlock
    from ds_interlock.engine import runner

    net, genuine = make_module(job), runner.training_program
    faulty = GradientFlowPlan.n_wise(window=faulty_window, stage_bounds=[0, 3, 6, 9, 11])

    def program(plan: Any, *args: Any, **kwargs: Any) -> Program:
        genuine_one = genuine(plan, *args, **kwargs)
        return without_receives(genuine_one) if plan == faulty else genuine_one

    runner.training_program = program
    try:
        return caught(ds_interlock.initialize, model=net, config=job.config())
    finally:
        runner.training_program = genuine


@pytest.mark.parametrize("faulty_window", [2, 1], ids=["first phase", "later phase"])
def test_training_is_refused_when_the_engine_is_made(ranks4: RankPool, faulty_window: float) -> None:
    for error in ranks4.run(refused_at_start, job=Job({"schedule": PHASES}), faulty_window=faulty_window):
        assert isinstance(error, ScheduleError)
        assert "1RECV_F0 is missing" in str(error)


def refused_evaluation() -> tuple[Exception | None, float]:
    from ds_interlock.engine import runner

    engine, genuine = make_engine(Job({"mode": "local"})), runner.evaluation_program
    runner.evaluation_program = lambda *args, **kwargs: without_receives(genuine(*args, **kwargs))
    try:
        error = caught(engine.eval_batch, iter(micro_batches(4)))
    finally:
        runner.evaluation_program = genuine
    loss = float(engine.eval_batch(iter(micro_batches(4))))
    engine.destroy()
    return error, loss


def test_evaluation_is_refused_when_it_is_first_called(ranks4: RankPool) -> None:
    for error, loss in ranks4.run(refused_evaluation):
        assert isinstance(error, ScheduleError)
        assert "is missing" in str(error)
        assert loss > 0, "and the genuine program still runs"
