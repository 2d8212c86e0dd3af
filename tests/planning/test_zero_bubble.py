"""ZB-H1: the line to beat among schedules with global gradients."""

import pytest

from ds_interlock.planning.zero_bubble import zero_bubble_batch
from ds_interlock.schedule import CostModel, GradientFlowPlan
from ds_interlock.schedule.action import Kind

UNIT = CostModel()
STAGES = (2, 4, 8)


def makespan(num_stages: int, num_micro_batches: int, costs: CostModel = UNIT) -> float:
    rows = zero_bubble_batch(GradientFlowPlan.end_to_end(num_stages), num_micro_batches, costs)
    return max(span.end for row in rows for span in row)


@pytest.mark.parametrize("num_stages", STAGES)
@pytest.mark.parametrize("times", [1, 2, 3, 8])
def test_with_as_many_micro_batches_as_stages_or_more_it_is_the_papers_formula(num_stages, times):
    # M (TF + TB + TW) + (K - 1) (TF + TB - TW): a third of the bubble of 1F1B at equal times.
    num_micro_batches = times * num_stages
    assert makespan(num_stages, num_micro_batches) == 3 * num_micro_batches + (num_stages - 1)


def test_one_micro_batch_goes_all_the_way_there_and_back():
    # 4 forwards, 4 input gradients, and the weight gradient of the first stage.
    assert makespan(4, 1) == 9


def test_work_that_needs_other_work_comes_after_it():
    costs = CostModel(forward=(1, 2, 1.5), input_gradient=(2, 1, 1), weight_gradient=1.5, latency=0.25)
    rows = zero_bubble_batch(GradientFlowPlan.end_to_end(3), 5, costs)
    ends = {(s.action.stage, s.action.kind, s.action.micro_batch): s.end for row in rows for s in row}
    assert len(ends) == 3 * 3 * 5
    for row in rows:
        for before, after in zip(row, row[1:], strict=False):
            assert before.end <= after.start
        for span in row:
            stage, kind, number = span.action.stage, span.action.kind, span.action.micro_batch
            if kind is Kind.FORWARD and stage > 0:
                assert span.start >= ends[stage - 1, kind, number] + 0.25
            if kind is Kind.INPUT_GRADIENT:
                assert span.start >= ends[stage, Kind.FORWARD, number]
                if stage < 2:
                    assert span.start >= ends[stage + 1, kind, number] + 0.25
            if kind is Kind.WEIGHT_GRADIENT:
                assert span.start >= ends[stage, Kind.INPUT_GRADIENT, number]


def test_messages_take_the_time_that_the_simulator_gives_them():
    # Two stages, one micro-batch: forward, message, forward, input gradient, message, input gradient, weight.
    link = CostModel(latency=0.5, bandwidth=10.0, forward_bytes=20.0, gradient_bytes=10.0)
    assert makespan(2, 1, link) == pytest.approx(1 + 2.5 + 1 + 1 + 1.5 + 1 + 1)
    # A forward sends faster than the link carries: the second message waits for the bytes of the first.
    slow = CostModel(bandwidth=1.0, forward_bytes=10.0)
    rows = zero_bubble_batch(GradientFlowPlan.end_to_end(2), 2, slow)
    starts = [span.start for span in rows[1] if span.action.kind is Kind.FORWARD]
    assert starts == [11.0, 21.0]


def test_no_stage_holds_more_micro_batches_than_1f1b_does():
    for row in zero_bubble_batch(GradientFlowPlan.end_to_end(4), 12, UNIT):
        held = peak = 0
        for span in row:
            held += {Kind.FORWARD: 1, Kind.WEIGHT_GRADIENT: -1}.get(span.action.kind, 0)
            peak = max(peak, held)
        assert peak <= 4
