"""What an action costs: per stage, and by the share of its layers that it runs."""

import pytest
from schedule_strategies import bounds_of

from ds_interlock.schedule import CostModel, GradientFlowPlan
from ds_interlock.schedule.action import Action

COSTS = CostModel(
    forward=(2.0, 10.0),
    input_gradient=(3.0, 20.0),
    weight_gradient=(5.0, 40.0),
    head=(0.5, 0.7),
    final_head=0.9,
    optimizer=(6.0, 8.0),
    latency=0.25,
    bandwidth=100.0,
    forward_bytes=300.0,
    gradient_bytes=50.0,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0F3", 2.0),
        ("1F0", 10.0),
        ("0H0@0", 0.5),
        ("1H0@1", 0.9),  # the model's own loss
        ("1I0@1", 20.0),
        ("0W0", 3.0 + 5.0),
        ("1B0", 20.0 + 40.0),
        ("0S4", 6.0),
        ("1SEND_I0@1", 0.0),
        ("1RECV_F0", 0.0),
        ("0LOAD0", 0.0),
        ("0REDUCE4", 0.0),
    ],
)
def test_each_kind(text, seconds):
    assert COSTS.seconds(GradientFlowPlan.local(2), Action.parse(text)) == seconds


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("1F0@0", 1 / 4),  # layers 5 of 5..8, up to the head
        ("1F0", 3 / 4),
        ("1I0@0", 1 / 4),  # from the head back to the stage's input
        ("0F0", 2 / 10),  # no head inside: the whole stage, which costs a fifth of stage 1
    ],
)
def test_work_on_a_part_of_a_stage_costs_its_share(text, share):
    plan = GradientFlowPlan.n_wise(window=1.25, stage_bounds=bounds_of(3, 4))
    costs = CostModel(forward=(2.0, 10.0, 7.0), input_gradient=(2.0, 10.0, 7.0))
    assert costs.seconds(plan, Action.parse(text)) == pytest.approx(10.0 * share)


def test_a_relay_from_behind_crosses_the_whole_stage():
    # Window 2.25: stage 2 relays its own inner head (loss 0) and loss 1, of stage 3, to stage 1.
    plan = GradientFlowPlan.n_wise(window=2.25, stage_bounds=bounds_of(4, 4))
    assert plan.relays(2) == (0, 1)
    assert RELAY_COSTS.seconds(plan, Action.parse("2I0@0")) == 2.0
    assert RELAY_COSTS.seconds(plan, Action.parse("2I0@1")) == 8.0


RELAY_COSTS = CostModel(input_gradient=8.0)


def test_messages():
    forward, gradient = Action.parse("0SEND_F0"), Action.parse("1SEND_I0@1")
    assert (COSTS.message_bytes(forward), COSTS.message_bytes(gradient)) == (300.0, 50.0)
    assert COSTS.message_seconds(forward) == pytest.approx(0.25 + 3.0)
    assert COSTS.message_seconds(gradient) == pytest.approx(0.25 + 0.5)
