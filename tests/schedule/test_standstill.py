"""Stages that wait for each other: none in the programs that are run, and seen in those that are not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import Transport
from schedule_strategies import bounds_of, lowered, plans, quick

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule import GradientFlowPlan, evaluation_program, simulate, training_program, verify
from ds_interlock.schedule.action import Action
from ds_interlock.schedule.codes import codes_of
from ds_interlock.schedule.lower import RECEIVE_AHEAD, lower
from ds_interlock.schedule.standstill import StandstillError, standstill

NAMED = [(8, 16, 5, 2), (8, 8, 5, 0), (8, 16, 5, 0)]
"""Stages, micro-batches, window, extra in flight: each stands still with two receives ahead."""


def in_codes(program):
    codes = codes_of(program.plan)
    return codes, [[codes.of(action) for action in row] for row in program.stages]


def stuck(program):
    return standstill(*in_codes(program))


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


# Payloads between devices.


@settings(quick, max_examples=40)
@given(plans(max_stages=12), st.integers(1, 32), st.integers(0, 4), st.data())
def test_by_the_rule_batches_of_any_kind_follow_each_other(plan, num_micro_batches, extra, data):
    """Training, evaluation, a change of the plan, and training again, without a pause."""
    window = data.draw(st.integers(1, plan.num_stages))
    other = GradientFlowPlan.n_wise(window=window, stage_bounds=plan.stage_bounds)
    batches = [
        training_program(plan, num_micro_batches, extra_in_flight=extra),
        evaluation_program(plan, num_micro_batches, all_heads=data.draw(st.booleans())),
        training_program(other, num_micro_batches, extra_in_flight=extra),
        training_program(plan, num_micro_batches, extra_in_flight=extra),
    ]
    assert not Transport().stuck([in_codes(program) for program in batches])


@pytest.mark.parametrize(
    ("transport", "smallest"),
    [
        (Transport(sender_waits="taken"), (2, 2, 1.25, 2)),
        (Transport(queue="link"), (2, 2, 1.25, 2)),
        (Transport(queue="direction"), (6, 5, 4, 1)),
        (Transport(primed=False), (2, 4, 1.25, 2)),
    ],
)
@pytest.mark.parametrize("case", [None, *NAMED])
def test_each_part_of_the_rule_is_needed(transport, smallest, case):
    num_stages, num_micro_batches, window, extra = case or smallest
    plan = GradientFlowPlan.n_wise(window=window, stage_bounds=bounds_of(num_stages, 4))
    batch = in_codes(training_program(plan, num_micro_batches, extra_in_flight=extra))
    assert not Transport().stuck([batch])
    # Only a first use of a communicator can wait for the other end, and not in every program.
    if case is None or transport.primed:
        assert transport.stuck([batch])


def test_the_lowering_is_a_part_of_the_rule():
    plan = GradientFlowPlan.n_wise(8, 5)
    assert Transport().stuck([in_codes(lowered(plan, 16, 2, receive_ahead=2))])
    assert not Transport().stuck([in_codes(lowered(plan, 16, 2, receive_ahead=5))])
