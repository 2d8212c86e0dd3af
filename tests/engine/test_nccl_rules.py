"""The engine under NCCL's rules: the bits that it gives on gloo, and a standstill where it breaks one."""

from typing import Any
from unittest.mock import patch

import pytest
from engine_jobs import Job, Outcome, assert_same, data_for, make_engine, train_all
from nccl_rules import nccl_rules, payloads_by
from ranks import RankError, RankPool
from schedule_strategies import crossings, receives_behind

from ds_interlock.schedule import Program, training_program
from ds_interlock.schedule.action import Kind
from ds_interlock.transport.links import Links, Sender
from ds_interlock.transport.staging import Staged

RECEIVE_BEHIND_SEND = "a receive moved behind a send"


def interlock(window: float, extra: int = 0) -> dict[str, Any]:
    return {"mode": "interlock", "window": window, "extra_in_flight": extra}


# Number of stages and micro-batches, and the mode. The last four stood still when a direction had one queue.
JOBS = [
    Job(section, num_stages=num_stages, num_micro_batches=num_micro_batches, num_batches=2)
    for num_stages, num_micro_batches, section in (
        (4, 3, {"mode": "global"}),
        (4, 3, {"mode": "local"}),
        (4, 8, interlock(3)),
        (4, 8, interlock(2, extra=1)),
        (4, 8, interlock(1.25, extra=1)),
        (2, 8, interlock(1.25, extra=4)),
    )
]


def train_on_all(jobs: list[Job]) -> list[tuple[Outcome, Outcome, Outcome]]:
    on_gloo = train_all(jobs)
    with nccl_rules():
        under_rules = train_all(jobs)
    with payloads_by(lambda self, store, rank: Staged(self.gloo(store, rank))):
        return list(zip(on_gloo, under_rules, train_all(jobs), strict=True))


def test_every_mode_gives_the_bits_of_gloo(ranks4: RankPool):
    for of_job in zip(*ranks4.run(train_on_all, jobs=JOBS), strict=True):
        on_gloo, under_rules, staged = zip(*of_job, strict=True)
        assert_same(on_gloo, under_rules)
        assert_same(on_gloo, staged)


def with_a_receive_behind_a_send(*args: Any, **kwargs: Any) -> Program:
    program = training_program(*args, **kwargs)
    return receives_behind(program, *crossings(program)[0])


def train_with_fault(fault: str) -> None:
    """Receives payloads as late as the rule allows: then the program orders them, and not chance."""
    seconds = 60 if fault == "none" else 3
    job = Job({**interlock(3), "timeout_seconds": seconds}, num_micro_batches=8, num_batches=2)
    changed = training_program if fault != RECEIVE_BEHIND_SEND else with_a_receive_behind_a_send
    with nccl_rules(), patch("ds_interlock.engine.runner.training_program", changed):
        engine = make_engine(job)
    links: Links = engine._runner.links
    links._start_payloads = lambda: None  # type: ignore[method-assign]
    if fault == "a sender waits for its payload":
        send = Sender.send

        def wait_too(self: Sender, *args: Any) -> None:
            send(self, *args)
            for payloads in self._payloads:
                payloads.wait()

        Sender.send = wait_too  # type: ignore[method-assign]
    for sends, receives in ((Kind.SEND_FORWARD, Kind.RECV_FORWARD), (Kind.SEND_GRADIENT, Kind.RECV_GRADIENT)):
        if fault == "one queue for each direction" and {sends, receives} <= links.channels.keys():
            links.channels[sends].payloads.stream = links.channels[receives].payloads.stream
    # A send ends once its receive is posted, as with the largest messages.
    with patch("ds_interlock.transport.links.SEND_AHEAD", 0):
        for _ in range(job.num_batches):
            engine.train_batch(data_for(engine, job))
    engine.drain()
    engine.destroy()


def test_payloads_may_be_received_as_late_as_they_are_taken(ranks4: RankPool):
    ranks4.run(train_with_fault, fault="none")


@pytest.mark.parametrize(
    "fault", ["a sender waits for its payload", "one queue for each direction", RECEIVE_BEHIND_SEND]
)
def test_a_broken_rule_is_a_standstill(fault: str):
    with RankPool(4) as pool, pytest.raises(RankError, match=r"(sent|took) nothing for 3 s|NoAnswer"):
        pool.run(train_with_fault, fault=fault, within_seconds=7)
