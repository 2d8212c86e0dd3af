"""The short version of ``measuring.faults``: two faults, which seeds choose which, and the check of ends."""

import pytest

from measuring.fault_job import Fault
from measuring.faults import PHASES, choose, end_problems, run_seed

KILLED_WHILE_SAVING, NAN = 234, 243


@pytest.mark.slow
@pytest.mark.parametrize("seed", [KILLED_WHILE_SAVING, NAN])
def test_faults_end_in_a_sentence_and_the_resumed_run_is_as_if_nothing_was(seed: int) -> None:
    row = run_seed(seed)
    assert not row["problems"], row
    assert row["sentence"]


def test_seeds_choose_every_kind_at_every_moment() -> None:
    chosen = {(fault.kind, fault.phase) for fault, *_ in map(choose, range(2000))}
    assert chosen == {(kind, phase) for kind, phases in PHASES.items() for phase in phases}


def test_an_end_that_is_not_as_it_should_be() -> None:
    fault = Fault("SIGKILL", "step", 1, 3)
    good = "PeerError: stage 0 (rank 0) stopped in batch 3: stage 1 (rank 1) has most likely stopped or died"
    assert end_problems(fault, 1.0, {0: good}, 2) == []
    assert end_problems(fault, 1.0, {}, 2) == ["the job did not end"]
    assert end_problems(fault, 99.0, {0: good}, 2) == ["took 99.0 s, expected 10"]
    assert end_problems(fault, 1.0, {0: good}, 3) == ["rank 2 said nothing"]
    (vague, _) = end_problems(fault, 1.0, {0: "RuntimeError: Connection closed by peer"}, 2)
    assert vague.startswith("rank 0 does not name stage, peer and batch")
