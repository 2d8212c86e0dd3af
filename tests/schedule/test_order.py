"""The order of work: small cases typed as grids, DeepSpeed's own 1F1B, and what holds for every plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import bounds_of, grid, plans, quick

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule import GradientFlowPlan, training_program
from ds_interlock.schedule import order as order_of_work
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.codes import codes_of
from ds_interlock.schedule.dependency import dependencies, stage_actions
from ds_interlock.schedule.render import render_text


def compute_order(plan, *arguments, **keywords):
    rows = order_of_work.compute_order(plan, *arguments, **keywords)
    return tuple(codes_of(plan).actions(row) for row in rows)


def test_local_never_waits_once_it_has_begun():
    assert render_text(training_program(GradientFlowPlan.local(3), 3)) == grid("""
        stage 0 | F0 H0 W0 F1 H1 W1 F2 H2 W2 S3
        stage 1 |    F0 H0 W0 F1 H1 W1 F2 H2 W2 S3
        stage 2 |       F0 H0 W0 F1 H1 W1 F2 H2 W2 S3
    """)


def test_window_2_relays_before_it_does_anything_else():
    assert render_text(training_program(GradientFlowPlan.n_wise(4, 2), 4)) == grid("""
        stage 0 | F0 F1       W0 F2    W1 F3       W2          W3 S4
        stage 1 |    F0 H0 I0 F1 H1 I1 W0 F2 H2 I2 W1 F3 H3 I3 W2 W3 S4
        stage 2 |       F0 H0 I0 F1 H1 I1 W0 F2 H2 I2 W1 F3 H3 I3 W2    W3 S4
        stage 3 |          F0 H0 I0 W0 F1 H1 I1 W1 F2 H2 I2 W2 F3 H3 I3 W3 S4
    """)


def test_global_is_1f1b():
    assert render_text(training_program(GradientFlowPlan.end_to_end(4), 5)) == grid("""
        stage 0 | F0 F1 F2 F3             W0 F4    W1       W2       W3       W4 S5
        stage 1 |    F0 F1 F2          B0 F3    B1 F4    B2       B3       B4 S5
        stage 2 |       F0 F1       B0 F2    B1 F3    B2 F4    B3       B4 S5
        stage 3 |          F0 H0 B0 F1 H1 B1 F2 H2 B2 F3 H3 B3 F4 H4 B4 S5
    """)


def test_fractional_window_relays_before_the_rest_of_the_forward():
    plan = GradientFlowPlan.n_wise(window=1.25, stage_bounds=bounds_of(3, 4))
    text = render_text(training_program(plan, 3))
    assert text == grid("""
    stage 0 | F0 F1         W0 F2           W1                     W2 S3
    stage 1 |    F0@0 H0 I0 F0 F1@0 H1   I1 F1 W0   F2@0 H2   I2   F2 W1                      W2 S3
    stage 2 |                  F0@1 H0@1 I0 F0 H0@2 W0   F1@1 H1@1 I1 F1 H1@2 W1 F2@1 H2@1 I2 F2 H2@2 W2 S3
    """)


def test_extra_in_flight_lets_a_stage_run_ahead():
    plan = GradientFlowPlan.n_wise(3, 2)
    first = [str(action) for action in compute_order(plan, 5, extra_in_flight=2)[0]]
    assert first[:4] == ["0F0", "0F1", "0F2", "0F3"]
    without = [str(action) for action in compute_order(plan, 5)[0]]
    assert without[:3] == ["0F0", "0F1", "0W0"]


def test_a_plan_may_have_policies_of_its_own():
    class RelaysLast(GradientFlowPlan):
        urgency = (*GradientFlowPlan.urgency[1:], Kind.INPUT_GRADIENT)

    class TwoPasses(GradientFlowPlan):
        merges_passes = False

    class WholeForwards(GradientFlowPlan):
        def forward_part(self, loss):
            return ()

    assert render_text(training_program(RelaysLast.n_wise(3, 2), 2)) == grid("""
        stage 0 | F0 F1             W0 W1 S2
        stage 1 |    F0 H0 F1 H1 I0 I1 W0       W1 S2
        stage 2 |       F0 H0 W0 I0 F1 H1 W1 I1 S2
    """)
    assert "1I0@0 1W0" in " ".join(map(str, compute_order(TwoPasses.end_to_end(2), 2)[1]))
    fractional = WholeForwards.n_wise(window=1.25, stage_bounds=bounds_of(2, 4))
    assert "1F0@0 1F0 1H0@0" in " ".join(map(str, compute_order(fractional, 1)[1]))


@pytest.mark.parametrize(
    ("num_stages", "num_micro_batches"), [(4, 8), (4, 2), (3, 3), (5, 7), (1, 3), (2, 1)]
)
def test_global_is_deepspeeds_own_schedule(num_stages, num_micro_batches):
    from deepspeed.runtime.pipe import schedule as theirs

    letters = {theirs.ForwardPass: "F", theirs.BackwardPass: "B"}
    ours = compute_order(GradientFlowPlan.end_to_end(num_stages), num_micro_batches)
    for stage in range(num_stages):
        steps = theirs.TrainSchedule(num_micro_batches, num_stages, stage).steps()
        expected = [letters[type(command)] for step in steps for command in step if type(command) in letters]
        kinds = [action.kind for action in ours[stage] if action.kind is not Kind.HEAD]
        assert ["F" if kind is Kind.FORWARD else "B" for kind in kinds] == expected


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "at least 1 micro-batch, got 0"), ((-3,), "at least 1 micro-batch, got -3")],
)
def test_there_must_be_a_micro_batch(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        compute_order(GradientFlowPlan.local(2), *arguments)


@pytest.mark.bad_input
def test_extra_in_flight_is_not_negative():
    with pytest.raises(ScheduleError, match="extra_in_flight is -1: expected 0 or more"):
        compute_order(GradientFlowPlan.local(2), 4, extra_in_flight=-1)


@quick
@given(plans(), st.integers(1, 6), st.integers(0, 3))
def test_every_action_once_and_after_what_it_needs(plan, num_micro_batches, extra):
    order = compute_order(plan, num_micro_batches, extra_in_flight=extra)
    for stage, actions in enumerate(order):
        work = [action for m in range(num_micro_batches) for action in stage_actions(plan, stage, m)]
        assert sorted(actions) == sorted(work)
        position = {action: number for number, action in enumerate(actions)}
        for action in actions:
            own = [needed for needed in dependencies(plan, action) if needed.stage == stage]
            assert all(position[needed] < position[action] for needed in own)
        assert _most_in_flight(actions) <= plan.in_flight(stage) + extra


def _most_in_flight(actions):
    """Most micro-batches between their first and their last action."""
    numbers = [action.micro_batch for action in actions]
    last = {number: position for position, number in enumerate(numbers)}
    first = {number: numbers.index(number) for number in last}
    return max(sum(first[m] <= at <= last[m] for m in first) for at in range(len(numbers)))


@quick
@given(plans(), st.integers(1, 5))
def test_the_order_is_the_same_on_every_run(plan, num_micro_batches):
    assert compute_order(plan, num_micro_batches) == compute_order(plan, num_micro_batches)
