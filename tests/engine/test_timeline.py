"""What the simulator makes of measured spans: played through at given costs, these are found again."""

import pytest

from ds_interlock.engine.timeline import measured_and_simulated, measured_costs, typical_batch
from ds_interlock.schedule import CostModel, GradientFlowPlan, simulate, training_program
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.simulate import Span

COSTS = CostModel(
    forward=[4.0, 5.0, 6.0],
    input_gradient=[8.0, 4.0, 6.0],
    weight_gradient=[8.0, 7.0, 3.0],
    head=0.75,
    final_head=0.25,
    optimizer=[0.5, 0.25, 0.125],
)


@pytest.mark.parametrize("window", [1.5, 2, 3])
def test_costs_are_found_again(window):
    plan = GradientFlowPlan.n_wise(window=window, stage_bounds=[0, 4, 8, 12])
    program = training_program(plan, 3)
    streaming = not plan.is_end_to_end
    rows = simulate(program, COSTS, num_batches=2, streaming=streaming).spans
    costs = measured_costs(plan, rows)
    for kind in ("forward", "optimizer"):
        assert getattr(costs, kind) == pytest.approx(getattr(COSTS, kind)), kind
    both = [i + w for i, w in zip(COSTS.input_gradient, COSTS.weight_gradient, strict=True)]
    both_again = [i + w for i, w in zip(costs.input_gradient, costs.weight_gradient, strict=True)]
    assert both_again == pytest.approx(both)
    for stage in range(3):
        if plan.bundles(stage) and not plan.is_end_to_end:
            assert costs.input_gradient[stage] == pytest.approx(COSTS.input_gradient[stage])
        if any(loss != plan.final for loss in plan.losses_at(stage)):
            assert costs.head[stage] == pytest.approx(0.75)
    assert costs.final_head == pytest.approx(0.25)


def test_what_was_simulated_looks_the_same_when_simulated_again():
    plan = GradientFlowPlan.n_wise(window=1.5, stage_bounds=[0, 4, 8, 12])
    program = training_program(plan, 2)
    rows = simulate(program, COSTS, num_batches=8).spans
    last = tuple(tuple(span for span in row if span.batch >= 6) for row in rows)
    measured, simulated = measured_and_simulated(program, last, streaming=True)
    lengths = [max(row[-1].end for row in timeline.rows) for timeline in (measured, simulated)]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.1)
    assert {span.batch for row in simulated.rows for span in row} == {0, 1}


def test_the_typical_batch_is_the_one_of_median_duration():
    def spans(stage, stretched):
        return tuple(
            Span(Action(stage, Kind.FORWARD, 0), batch, 10.0 * batch, 10.0 * batch + seconds)
            for batch, seconds in enumerate(stretched)
        )

    assert typical_batch((spans(0, [1, 1, 1, 1]), spans(1, [9, 2, 5, 3]))) == 3
    assert typical_batch((spans(0, [1, 9, 1]), spans(1, [4, 2, 3]))) == 0
