"""A configuration whose stages wait for each other if they receive only two messages ahead.

Eight stages, 16 micro-batches, window 5, two extra in flight: the lowering chooses five.
"""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
from engine_jobs import Job, outcomes, train
from ranks import RankPool, caught

from ds_interlock.errors import PeerError
from ds_interlock.schedule import training_program

JOB = Job(
    {"mode": "interlock", "window": 5, "extra_in_flight": 2},
    num_stages=8,
    num_micro_batches=16,
    num_batches=2,
)


@pytest.fixture(scope="module")
def ranks8() -> Iterator[RankPool]:
    with RankPool(8) as pool:
        yield pool


def test_the_stages_do_not_wait_for_each_other(ranks8: RankPool) -> None:
    (extra,) = outcomes(ranks8, JOB)
    assert len({outcome.final for outcome in extra}) == 1


def train_with_two_receives_ahead(job: Job) -> Exception | None:
    with (
        patch("ds_interlock.schedule.lower.standstill", return_value=[]),
        patch("ds_interlock.schedule.verify.standstill", return_value=[]),
    ):
        training_program.cache_clear()
        return caught(train, job)


def test_with_two_receives_ahead_they_do(ranks8: RankPool) -> None:
    job = JOB.but(section={**JOB.section, "timeout_seconds": 4})
    for error in ranks8.run(train_with_two_receives_ahead, job=job):
        assert isinstance(error, PeerError)
