"""Which plan is in force when, and the heads of all of them."""

import pytest

from ds_interlock.errors import PlanError
from ds_interlock.schedule.phases import PlanSchedule
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead
from ds_interlock.schedule.program import evaluation_program

BOUNDS = [0, 2, 5, 7, 9]
LOCAL = GradientFlowPlan.local(stage_bounds=BOUNDS)
WINDOW_2 = GradientFlowPlan.n_wise(window=2, stage_bounds=BOUNDS)
FRACTIONAL = GradientFlowPlan.n_wise(window=1.5, stage_bounds=BOUNDS, head_weight=0.5)
END_TO_END = GradientFlowPlan.end_to_end(stage_bounds=BOUNDS)


def test_the_step_decides():
    schedule = PlanSchedule.of((0, LOCAL), (20, WINDOW_2), (80, END_TO_END))
    assert [schedule.phase_at(step) for step in (0, 19, 20, 79, 80, 10**6)] == [0, 0, 1, 1, 2, 2]
    assert schedule.plan_at(50) == WINDOW_2
    assert schedule.stage_bounds == tuple(BOUNDS)
    assert not schedule.is_end_to_end


def test_one_plan_is_a_schedule_of_one_phase():
    schedule = PlanSchedule.constant(FRACTIONAL)
    assert schedule == PlanSchedule.of((0, FRACTIONAL))
    assert schedule.plan_at(10**6) == FRACTIONAL
    assert schedule.heads == FRACTIONAL.heads[:-1]
    # Going forward by all heads is what an evaluation of the plan is.
    of_all = evaluation_program(schedule.plan_with_all_heads, 3, all_heads=True)
    assert of_all.stages == evaluation_program(FRACTIONAL, 3, all_heads=True).stages


def test_heads_at_one_place_are_one_head_and_keep_the_numbers_of_their_first_phase():
    schedule = PlanSchedule.of((0, WINDOW_2), (3, FRACTIONAL), (5, LOCAL), (9, END_TO_END))
    # Window 2: behind layers 5 and 7; window 1.5: in the midst of stages 1 to 3; local: 2, 5 and 7.
    assert [(head.stage, head.after_layer) for head in schedule.heads] == [
        (1, 5),
        (2, 7),
        (1, 4),
        (2, 6),
        (3, 8),
        (0, 2),
    ]
    assert schedule.heads[2].weight == 0.5
    assert schedule.heads[1].after_layer == 7
    idle = [[schedule.is_idle(head, phase) for head in range(6)] for phase in range(4)]
    assert idle == [
        [False, False, True, True, True, True],
        [True, True, False, False, False, True],
        [False, False, True, True, True, False],
        [True] * 6,
    ]


def test_the_plan_with_all_heads_has_them_in_the_order_of_layers():
    plan = PlanSchedule.of((0, END_TO_END), (5, FRACTIONAL), (9, LOCAL)).plan_with_all_heads
    assert [head.after_layer for head in plan.heads] == [2, 4, 5, 6, 7, 8, 9]
    assert PlanSchedule.constant(END_TO_END).plan_with_all_heads == END_TO_END


def test_end_to_end_throughout():
    assert PlanSchedule.of((0, END_TO_END), (3, END_TO_END)).is_end_to_end
    assert PlanSchedule.constant(END_TO_END).heads == ()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ([], "it has no phases"),
        ([(1, LOCAL)], "the first phase begins at step 1, expected 0"),
        ([(0, LOCAL), (5, WINDOW_2), (5, LOCAL)], r"begin at steps \[0, 5, 5\], expected rising numbers"),
        ([(0, LOCAL), (5, GradientFlowPlan.local(4))], r"phase 1 is for stage_bounds \[0, 1, 2, 3, 4\]"),
        ([(2, LOCAL), (1, GradientFlowPlan.local(4))], "3 faults"),
    ],
)
def test_phases_that_do_not_fit_together(phases, expected):
    with pytest.raises(PlanError, match=expected):
        PlanSchedule.of(*phases)


def test_a_head_is_the_first_that_stands_there():
    heavy = GradientFlowPlan.n_wise(window=2, stage_bounds=BOUNDS, head_weight=3.0)
    assert PlanSchedule.of((0, LOCAL), (4, heavy)).heads == LOCAL.heads[:-1]
    assert PlanSchedule.of((0, heavy), (4, LOCAL)).heads == (
        LossHead(1, 5, 3.0),
        LossHead(2, 7, 3.0),
        LossHead(0, 2),
    )
