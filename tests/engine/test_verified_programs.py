"""A program that could hang, or that does not do what its plan says, is refused before it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from engine_jobs import Job, make_engine, make_module, micro_batches
from ranks import RankPool, caught

from ds_interlock import GradientFlowPlan, ScheduleError
from ds_interlock.schedule import evaluation_program, training_program
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.codes import Codes
from ds_interlock.schedule.lower import lower

PHASES = [{"from_step": 0, "window": 2}, {"from_step": 2, "window": 1}]


@contextmanager
def without_receives(faulty: GradientFlowPlan | None = None) -> Iterator[None]:
    """Lowering forgets the receives of forwards under the plan ``faulty``, by default under all plans."""

    def lowered(codes: Codes, work: Any) -> tuple[tuple[Action, ...], ...]:
        rows = lower(codes, work)
        if faulty not in (None, codes.plan):
            return rows
        return tuple(tuple(a for a in row if a.kind is not Kind.RECV_FORWARD) for row in rows)

    def forget() -> None:
        training_program.cache_clear()
        evaluation_program.cache_clear()

    forget()
    with patch("ds_interlock.schedule.program.lower", lowered):
        yield
    forget()


def refused_at_start(job: Job, faulty_window: float) -> Exception | None:
    import ds_interlock

    net = make_module(job)
    with without_receives(GradientFlowPlan.n_wise(window=faulty_window, stage_bounds=[0, 3, 6, 9, 11])):
        return caught(ds_interlock.initialize, model=net, config=job.config())


@pytest.mark.parametrize("faulty_window", [2, 1], ids=["first phase", "later phase"])
def test_training_is_refused_when_the_engine_is_made(ranks4: RankPool, faulty_window: float) -> None:
    for error in ranks4.run(refused_at_start, job=Job({"schedule": PHASES}), faulty_window=faulty_window):
        assert isinstance(error, ScheduleError)
        assert "1RECV_F0 is missing" in str(error)


def refused_evaluation() -> tuple[Exception | None, float]:
    engine = make_engine(Job({"mode": "local"}))
    with without_receives():
        error = caught(engine.eval_batch, iter(micro_batches(4)))
    loss = float(engine.eval_batch(iter(micro_batches(4))))
    engine.destroy()
    return error, loss


def test_evaluation_is_refused_when_it_is_first_called(ranks4: RankPool) -> None:
    for error, loss in ranks4.run(refused_evaluation):
        assert isinstance(error, ScheduleError)
        assert "is missing" in str(error)
        assert loss > 0, "and the genuine program still runs"
