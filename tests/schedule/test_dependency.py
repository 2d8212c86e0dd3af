"""What must be done before what, worked by hand; and that it holds together for every plan."""

import pytest
from hypothesis import given
from schedule_strategies import bounds_of, plans, quick

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule import GradientFlowPlan
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.dependency import dependencies, stage_actions

WINDOW_2 = GradientFlowPlan.n_wise(4, 2)
GLOBAL = GradientFlowPlan.end_to_end(3)
FRACTIONAL = GradientFlowPlan.n_wise(window=1.5, stage_bounds=bounds_of(3, 4))


@pytest.mark.parametrize(
    ("plan", "stage", "expected"),
    [
        (GradientFlowPlan.local(3), 1, "1F5 1H5@1 1W5"),
        (WINDOW_2, 0, "0F5 0W5"),
        (WINDOW_2, 1, "1F5 1H5@0 1I5@0 1W5"),
        (WINDOW_2, 2, "2F5 2H5@1 2I5@1 2W5"),
        (WINDOW_2, 3, "3F5 3H5@2 3I5@2 3W5"),
        (GLOBAL, 0, "0F5 0W5"),
        (GLOBAL, 1, "1F5 1B5"),
        (GLOBAL, 2, "2F5 2H5@0 2B5"),
        (FRACTIONAL, 2, "2F5@1 2F5 2H5@1 2H5@2 2I5@1 2W5"),
        # All that comes back trains and travels on: one pass does both.
        (GradientFlowPlan.deep_supervision(3), 1, "1F5 1H5@1 1B5"),
        (GradientFlowPlan.end_to_end(1), 0, "0F5 0H5@0 0W5"),
    ],
)
def test_the_work_of_a_stage(plan, stage, expected):
    assert sorted(map(str, stage_actions(plan, stage, 5))) == sorted(expected.split())


@pytest.mark.parametrize(
    ("plan", "action", "needs"),
    [
        (WINDOW_2, "0F0", ""),
        (WINDOW_2, "0F2", "0F1"),
        (WINDOW_2, "2F2", "1F2 2F1"),
        (WINDOW_2, "1H2@0", "1F2 1H1@0"),
        (WINDOW_2, "1I2@0", "1H2@0"),
        (WINDOW_2, "0W0", "1I0@0"),
        (WINDOW_2, "1W2", "1H2@0 2I2@1 1W1"),
        (WINDOW_2, "3W0", "3H0@2"),
        (GLOBAL, "0W1", "1B1 0W0"),
        (GLOBAL, "1B1", "2B1 1B0"),
        (GLOBAL, "2B0", "2H0@0"),
        (FRACTIONAL, "2F0@1", "1F0"),
        (FRACTIONAL, "2F1", "2F1@1 2F0"),
        (FRACTIONAL, "2H0@1", "2F0@1"),
        (FRACTIONAL, "2H0@2", "2F0"),
        (FRACTIONAL, "2I0@1", "2H0@1"),
        (FRACTIONAL, "1W0", "2I0@1"),
        (WINDOW_2, "0REDUCE2", "0F0 0W0 0F1 0W1"),
        (WINDOW_2, "0S1", "0F0 0W0 0REDUCE1"),
    ],
)
def test_needs(plan, action, needs):
    found = dependencies(plan, Action.parse(action))
    assert sorted(map(str, found)) == sorted(needs.split())


def test_losses_that_arrive_apart_are_all_needed():
    # Window 3 over 5 stages: stage 2 is trained by losses 0 (its own), 1 and 2, which come apart.
    plan = GradientFlowPlan.n_wise(5, 3)
    needs = dependencies(plan, Action.parse("2W0"))
    assert set(map(str, needs)) == {"2H0@0", "3I0@1", "3I0@2"}
    assert set(map(str, dependencies(plan, Action.parse("2I0@1")))) == {"3I0@1"}


@pytest.mark.parametrize(
    "action", ["0H0@0", "1I0@1", "1B0", "0LOAD0", "1SEND_F0", "1F0@0", "4F0", "9S2", "4REDUCE1"]
)
def test_work_that_the_plan_does_not_ask_for_has_no_needs(action):
    with pytest.raises(ScheduleError, match=action):
        dependencies(WINDOW_2, Action.parse(action))


@quick
@given(plans())
def test_needs_are_work_of_the_plan_and_nothing_needs_itself(plan):
    """What is needed exists, on the stage or next to it; and there is an order that serves all needs."""
    actions = {
        action for k in range(plan.num_stages) for m in range(2) for action in stage_actions(plan, k, m)
    }
    waiting = {action: set(dependencies(plan, action)) for action in actions}
    for action, needs in waiting.items():
        assert needs <= actions
        assert all(abs(needed.stage - action.stage) <= 1 for needed in needs)
        assert all(needed.micro_batch <= action.micro_batch for needed in needs)
    done: set[Action] = set()
    while ready := {action for action in actions - done if waiting[action] <= done}:
        done |= ready
    assert done == actions


@quick
@given(plans())
def test_every_loss_gets_to_every_stage_it_trains(plan):
    """Walking back from a weight gradient meets the heads of exactly the losses that train the stage."""
    for stage in range(plan.num_stages):
        last = next(
            a for a in stage_actions(plan, stage, 0) if a.kind in (Kind.WEIGHT_GRADIENT, Kind.BACKWARD)
        )
        seen: set[Action] = set()
        front = {last}
        while front:
            action = front.pop()
            seen.add(action)
            if action.kind is not Kind.HEAD:
                front |= set(dependencies(plan, action)) - seen
        heads = {loss for action in seen if action.kind is Kind.HEAD for loss in action.losses}
        assert heads == plan.trained_by[stage]
