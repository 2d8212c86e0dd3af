"""The verifier accepts every program the lowering makes, and rejects what has been tampered with."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import bounds_of, grid, plans, quick

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule import (
    GradientFlowPlan,
    Program,
    evaluation_program,
    simulate,
    training_program,
    verify,
    verify_evaluation,
)
from ds_interlock.schedule.action import Action


def with_rows(program, **rows):
    """``program`` with whole lists of stages typed anew, ``s1="..."`` that of stage 1."""
    stages = list(program.stages)
    for name, text in rows.items():
        stage = int(name[1:])
        stages[stage] = tuple(Action.parse(f"{stage}{word}") for word in text.split())
    return replace(program, stages=tuple(stages))


def fault(program, **arguments):
    with pytest.raises(ScheduleError) as error:
        verify(program, **arguments)
    return str(error.value)


# What is accepted.


@quick
@given(plans(), st.integers(1, 6), st.integers(0, 3))
def test_every_lowered_program_is_accepted(plan, num_micro_batches, extra):
    verify(training_program(plan, num_micro_batches, extra_in_flight=extra), extra_in_flight=extra)


@quick
@given(plans(), st.integers(1, 4), st.booleans())
def test_every_evaluation_program_is_accepted(plan, num_micro_batches, all_heads):
    verify_evaluation(evaluation_program(plan, num_micro_batches, all_heads=all_heads), all_heads=all_heads)


def test_another_order_that_serves_all_needs_is_accepted():
    program = training_program(GradientFlowPlan.n_wise(2, 2), 2)
    verify(
        with_rows(
            program,
            s0="LOAD0 LOAD1 F0 SEND_F0 RECV_I0@0 RECV_I1@0 F1 SEND_F1 W0 W1 REDUCE2 S2",
            s1="RECV_F0 F0 H0@0 B0 RECV_F1 SEND_I0@0 F1 H1@0 B1 SEND_I1@0 REDUCE2 S2",
        )
    )


# Single faults, with their message.

LOCAL = training_program(GradientFlowPlan.local(2), 2)
GLOBAL = training_program(GradientFlowPlan.end_to_end(2), 2)


def test_the_typed_rows_are_those_of_the_program():
    assert with_rows(
        LOCAL,
        s0="LOAD0 F0 SEND_F0 H0@0 W0 LOAD1 F1 SEND_F1 H1@0 W1 REDUCE2 S2",
        s1="RECV_F0 RECV_F1 F0 H0@1 W0 F1 H1@1 W1 REDUCE2 S2",
    ) == LOCAL  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"s0": "LOAD0 F0 SEND_F0 H0@0 LOAD1 F1 SEND_F1 H1@0 W1 REDUCE2 S2"},
            "0W0 is missing",
        ),
        (
            {"s1": "RECV_F0 RECV_F1 F0 H0@1 W0 F1 H1@1 W1 W1 REDUCE2 S2"},
            "1W1 appears 2 times, expected once",
        ),
        (
            {"s1": "RECV_F0 RECV_F1 F0 H0@1 W0 F1 H1@1 W1 B1 REDUCE2 S2"},
            "1B1 is not work of the plan; leave it out",
        ),
        (
            {"s0": "LOAD0 F0 SEND_F0 W0 H0@0 LOAD1 F1 SEND_F1 H1@0 W1 REDUCE2 S2"},
            "0W0 comes before 0H0@0, which it needs",
        ),
        (
            {"s1": "RECV_F0 F0 H0@1 W0 F1 RECV_F1 H1@1 W1 REDUCE2 S2"},
            "1F1 comes before 1RECV_F1, which it needs",
        ),
        (
            {"s0": "LOAD0 F0 SEND_F0 H0@0 W0 LOAD1 SEND_F1 F1 H1@0 W1 REDUCE2 S2"},
            "0SEND_F1 comes before 0F1, which it needs",
        ),
        (
            {"s0": "F0 LOAD0 SEND_F0 H0@0 W0 LOAD1 F1 SEND_F1 H1@0 W1 REDUCE2 S2"},
            "0F0 comes before 0LOAD0, which it needs",
        ),
        (
            {"s0": "LOAD1 LOAD0 F0 SEND_F0 H0@0 W0 F1 SEND_F1 H1@0 W1 REDUCE2 S2"},
            "stage 0 loads 0LOAD1, 0LOAD0 where the data set has 0LOAD0, 0LOAD1, in this order",
        ),
        (
            {"s1": "RECV_F1 RECV_F0 F0 H0@1 W0 F1 H1@1 W1 REDUCE2 S2"},
            "stage 0 sends 0SEND_F0, 0SEND_F1 where stage 1 receives 0SEND_F1, 0SEND_F0, in this order",
        ),
        (
            {"s1": "RECV_F0 RECV_F1 F0 H0@1 W0 F1 H1@1 REDUCE2 S2 W1"},
            "stage 1 must end with 1REDUCE2 1S2, it ends with 1S2 1W1",
        ),
        (
            {"s0": "LOAD0 F0 SEND_F0 H0@0 W0 LOAD1 F1 SEND_F1 H1@0 W1 S2 REDUCE2"},
            "stage 0 must end with 0REDUCE2 0S2, it ends with 0S2 0REDUCE2",
        ),
        (
            {"s0": "LOAD0 F0 SEND_F0 H0@0 LOAD1 F1 W0 SEND_F1 H1@0 W1 REDUCE2 S2"},
            "0F1 begins micro-batch 2 at once on stage 0, slots: 1",
        ),
    ],
)
def test_a_single_fault_of_local(rows, message):
    text = fault(with_rows(LOCAL, **rows))
    assert text.splitlines()[0] == f"program: {message}"


def test_an_action_on_another_stage():
    stages = list(LOCAL.stages)
    stages[0] = tuple(action for action in stages[0] if str(action) != "0W1")
    stages[1] = (*stages[1][:-2], Action.parse("0W1"), *stages[1][-2:])
    assert fault(replace(LOCAL, stages=tuple(stages))) == grid("""
        program: 0W1 is in the list of stage 1, not of its own stage
        stage 0 | F0 H0 W0 F1 H1 S2
        stage 1 |    F0 H0 W0 F1 H1 W1 >0W1< S2
    """)


def test_slots():
    assert "stage 0 has slots for 3 micro-batches; the plan and extra_in_flight 0 allow 2" in fault(
        replace(GLOBAL, slots=(3, 1))
    )
    verify(replace(GLOBAL, slots=(3, 1)), extra_in_flight=1)
    assert "0F1 begins micro-batch 2 at once on stage 0, slots: 1" in fault(replace(GLOBAL, slots=(1, 1)))


def test_two_live_micro_batches_in_one_buffer():
    class Clash(Program):
        def buffer(self, action: Action) -> int:
            return 0

    clash = Clash(GLOBAL.plan, GLOBAL.num_micro_batches, GLOBAL.slots, GLOBAL.stages)
    assert "0F1 takes the buffer that 0F0 filled and that is still in use" in fault(clash)


def test_a_micro_batch_that_is_done_out_of_turn_does_not_free_its_neighbours_buffer():
    # Window 2: stage 1 relays micro-batch 1 last of all, so that 0, 2 share a buffer while 0 is in use.
    program = training_program(GradientFlowPlan.n_wise(3, 2), 3)
    tampered = with_rows(
        program,
        s1="RECV_I0@1 RECV_I1@1 RECV_F0 RECV_F1 F0 SEND_F0 H0@0 F1 SEND_F1 H1@0 I1@0 SEND_I1@0 W0 W1 "
        "RECV_F2 RECV_I2@1 F2 I0@0 SEND_I0@0 SEND_F2 H2@0 I2@0 SEND_I2@0 W2 REDUCE3 S3",
    )
    assert "1F2 takes the buffer that 1F0 filled and that is still in use" in fault(tampered)


def test_a_standstill_under_rendezvous_is_found_and_marked():
    # Everything is in order on each stage. But stage 0 will not receive before its second forward is
    # taken, and stage 1 takes it only once its first gradient is gone.
    tampered = with_rows(
        GLOBAL,
        s0="LOAD0 F0 SEND_F0 LOAD1 F1 SEND_F1 RECV_I0@0 W0 RECV_I1@0 W1 REDUCE2 S2",
        s1="RECV_F0 F0 H0@0 B0 SEND_I0@0 RECV_F1 F1 H1@0 B1 SEND_I1@0 REDUCE2 S2",
    )
    # With buffered sends the fault would not show.
    simulate(tampered, send_ahead=1)
    assert fault(tampered) == grid("""
        program: the stages wait for each other: none of 0SEND_F1, 1SEND_I0@0 can start
        stage 0 | F0 F1 >0SEND_F1<    W0                    W1 S2
        stage 1 |    F0 H0         B0 >1SEND_I0@0< F1 H1 B1 S2
    """)


def test_all_faults_are_listed_at_once_with_the_grid_marked():
    tampered = with_rows(
        training_program(GradientFlowPlan.n_wise(3, 2), 2),
        s0="RECV_I0@0 RECV_I1@0 LOAD0 F0 SEND_F0 LOAD1 F1 SEND_F1 W1 REDUCE2 S2",
        s1="RECV_I0@1 RECV_I1@1 RECV_F0 RECV_F1 F0 SEND_F0 H0@0 I0@1 SEND_I0@0 F1 SEND_F1 I1@0 H1@0 "
        "SEND_I1@0 W0 W1 REDUCE2 S2",
    )
    assert fault(tampered).replace("\n  - ", "\n- ") == grid("""
        program: 4 faults
        - 1I0@1 is not work of the plan; leave it out
        - 0W0 is missing
        - 1I0@0 is missing
        - 1I1@0 comes before 1H1@0, which it needs
        stage 0 | F0 F1                       W1      S2          >0W0?<
        stage 1 |    F0 H0 >1I0@1< F1 >1I1@0< >1H1@0< W0    W1 S2 >1I0@0?<
        stage 2 |       F0 H0      I0 W0      F1      H1 I1 W1 S2
    """)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": (1,)}, "slots has 1 entries for 2 stages"),
        ({"slots": (1, 0)}, "stage 1 has 0 slots, it needs at least 1"),
        ({"stages": ()}, "stages has 0 entries for 2 stages"),
        ({"num_micro_batches": 0}, "at least 1 micro-batch, got 0"),
    ],
)
def test_programs_without_a_shape(changes, message):
    for check in (verify, lambda program: verify_evaluation(program, all_heads=True)):
        with pytest.raises(ScheduleError, match=message):
            check(replace(LOCAL, **changes))


def test_evaluation_and_training_are_not_taken_for_each_other():
    plan = GradientFlowPlan.n_wise(window=1.5, stage_bounds=bounds_of(3, 4))
    final_only = evaluation_program(plan, 2, all_heads=False)
    with pytest.raises(ScheduleError, match="1H0@0 is missing"):
        verify_evaluation(final_only, all_heads=True)
    with pytest.raises(ScheduleError, match="1H1@0 is not work of the plan"):
        verify_evaluation(evaluation_program(plan, 2, all_heads=True), all_heads=False)
    with pytest.raises(ScheduleError, match="0W0 is missing"):
        verify(final_only)
    with pytest.raises(ScheduleError, match="0W0 is not work of the plan"):
        verify_evaluation(training_program(plan, 2), all_heads=True)
