"""Stages that wait for each other: none in the programs that are run, and seen in those that are not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_strategies import lowered, plans, quick

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule import GradientFlowPlan, evaluation_program, simulate, training_program, verify
from ds_interlock.schedule.action import Action
from ds_interlock.schedule.codes import codes_of
from ds_interlock.schedule.lower import RECEIVE_AHEAD, lower
from ds_interlock.schedule.standstill import StandstillError, standstill

NAMED = [(8, 16, 5, 2), (8, 8, 5, 0), (8, 16, 5, 0)]
"""Stages, micro-batches, window, extra in flight: each stands still with two receives ahead."""


def stuck(program):
    codes = codes_of(program.plan)
    return standstill(codes, [[codes.of(action) for action in row] for row in program.stages])


def stuck_in_the_simulator(program):
    try:
        simulate(program, send_ahead=0, num_batches=2)
    except StandstillError as error:
        return list(error.places)
    return []


@pytest.mark.parametrize(("num_stages", "num_micro_batches", "window", "extra"), NAMED)
def test_the_receives_ahead_are_as_few_as_are_safe(num_stages, num_micro_batches, window, extra):
    plan = GradientFlowPlan.n_wise(num_stages, window)
    safe = training_program(plan, num_micro_batches, extra_in_flight=extra)
    numbers = range(RECEIVE_AHEAD, 8)
    programs = [lowered(plan, num_micro_batches, extra, receive_ahead=number) for number in numbers]
    assert stuck(programs[0])
    assert programs[0] != safe
    assert safe == next(program for program in programs if not stuck(program))
    with pytest.raises(ScheduleError, match="the stages wait for each other: none of"):
        verify(programs[0], extra_in_flight=extra)


@quick
@given(plans(), st.integers(1, 9), st.integers(0, 3), st.integers(1, 3))
def test_the_simulator_stands_still_in_the_same_places(plan, num_micro_batches, extra, ahead):
    program = lowered(plan, num_micro_batches, extra, receive_ahead=ahead)
    assert stuck(program) == stuck_in_the_simulator(program)


@settings(quick, max_examples=120)
@given(plans(max_stages=12), st.integers(1, 32), st.integers(0, 4))
def test_no_program_stands_still(plan, num_micro_batches, extra):
    assert not stuck(training_program(plan, num_micro_batches, extra_in_flight=extra))
    for all_heads in (False, True):
        assert not stuck(evaluation_program(plan, num_micro_batches, all_heads=all_heads))


def test_an_order_that_no_receives_can_save_is_refused():
    codes = codes_of(GradientFlowPlan.end_to_end(2))
    texts = [
        "0F0 0W0 0F1 0W1",
        "1F0 1F1 1H0@0 1H1@0 1B0 1B1",
    ]  # both want the other to go first
    work = [[codes.of(Action.parse(text)) for text in row.split()] for row in texts]
    with pytest.raises(ScheduleError, match="makes the stages wait for each other, however"):
        lower(codes, work)
