"""Times worked by hand, and what holds for every plan."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import bounds_of, costs, plans, quick

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule import CostModel, GradientFlowPlan, evaluation_program, simulate, training_program
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.standstill import StandstillError


def _times(simulation, stage):
    return [
        (str(span.action), pytest.approx(span.start), pytest.approx(span.end))
        for span in simulation.spans[stage]
    ]


@pytest.mark.parametrize("num_stages", [2, 8])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_local_needs_no_more_than_its_work(num_stages, num_micro_batches):
    # Forward 1, head 0.3, backward 2.
    program = training_program(GradientFlowPlan.local(num_stages), num_micro_batches)
    assert simulate(program).batch_seconds == pytest.approx(3.3 * num_micro_batches)


@pytest.mark.parametrize("num_micro_batches", [1, 4, 8])
@pytest.mark.parametrize("num_stages", [4, 8])
def test_global_is_the_ideal_1f1b(num_stages, num_micro_batches):
    simulation = simulate(training_program(GradientFlowPlan.end_to_end(num_stages), num_micro_batches))
    slots = num_micro_batches + num_stages - 1
    assert simulation.batch_seconds == pytest.approx(3 * slots)
    assert simulation.bubble_fraction == pytest.approx((num_stages - 1) / slots)


def test_window_2_of_8_stages():
    # Forward 1, head 0.3, relay 1, backward for the weights 2: 4.3 for each of 4 micro-batches.
    simulation = simulate(training_program(GradientFlowPlan.n_wise(8, 2), 4))
    assert simulation.batch_seconds == pytest.approx(17.2)


def test_the_first_batch_fills_the_pipeline():
    # Stage 1 sends its second forward at 1 + 3.3 + 1; stage 2 then works for another 3.
    program = training_program(GradientFlowPlan.local(3), 2)
    assert simulate(program, num_batches=1).batch_seconds == pytest.approx(5.3 + 3.0)
    assert simulate(program, num_batches=5).batch_seconds == pytest.approx(2 * 3.3)


def test_without_streaming_every_batch_fills_the_pipeline():
    program = training_program(GradientFlowPlan.local(3), 2)
    simulation = simulate(program, streaming=False, num_batches=3)
    assert simulation.batch_seconds == pytest.approx(8.3)
    # A batch has 2 x (3.3 + 3.3 + 3) of work in 3 x 8.3 of time.
    assert simulation.bubble_fraction == pytest.approx(1 - 19.2 / 24.9)
    # Seven actions a batch and stage. The second batch begins on all stages when the first is done.
    assert [spans[7].batch for spans in simulation.spans] == [1, 1, 1]
    assert simulation.spans[0][7].start == pytest.approx(8.3)


def test_latency_and_bandwidth_of_two_stages():
    # A forward message takes 0.5 + 20/10 = 2.5, a gradient 0.5 + 10/10 = 1.5.
    link = CostModel(latency=0.5, bandwidth=10.0, forward_bytes=20.0, gradient_bytes=10.0, optimizer=0.25)
    simulation = simulate(training_program(GradientFlowPlan.end_to_end(2), 1), link, num_batches=1)
    # Stage 0's forward ends at 1, arrives at 3.5; forward and backward there end at 4.5 and 6.5; the
    # gradient arrives at 8, the weight gradient (a whole backward pass) ends at 10.
    assert _times(simulation, 0) == [("0F0", 0, 1), ("0W0", 8, 10), ("0S1", 10, 10.25)]
    assert _times(simulation, 1) == [
        ("1F0", 3.5, 4.5),
        ("1H0@0", 4.5, 4.5),
        ("1B0", 4.5, 6.5),
        ("1S1", 6.5, 6.75),
    ]
    assert simulation.batch_seconds == pytest.approx(10.25)
    # Work: 1 + 2 + 0.25 on either stage.
    assert simulation.bubble_fraction == pytest.approx(1 - 6.5 / 20.5)
    assert simulation.relay_bytes == (0.0, 10.0)


def test_messages_of_one_link_queue_for_its_bandwidth_but_not_for_its_latency():
    # A message keeps the link for 5. The first is sent at 1 and arrives at 1 + 5 + 0.5; the second is
    # sent at 4.3, finds the link free at 6 and arrives at 6 + 5 + 0.5.
    link = CostModel(latency=0.5, bandwidth=10.0, forward_bytes=50.0)
    simulation = simulate(training_program(GradientFlowPlan.local(2), 2), link, num_batches=1)
    starts = [span.start for span in simulation.spans[1] if span.action.kind is Kind.FORWARD]
    assert starts == [pytest.approx(6.5), pytest.approx(11.5)]


def test_a_sender_waits_when_too_many_messages_are_on_their_way():
    # Messages take 10 each, one after the other, and stage 0 has but 3.3 to do for each.
    link = CostModel(bandwidth=1.0, forward_bytes=10.0)
    program = training_program(GradientFlowPlan.local(2), 3)

    def forwards(send_ahead):
        simulation = simulate(program, link, num_batches=1, send_ahead=send_ahead)
        return [span.start for span in simulation.spans[0] if span.action.kind is Kind.FORWARD]

    # Rendezvous: head and backward only start once the message has arrived, at 11 and 24.3.
    assert forwards(0) == [pytest.approx(0), pytest.approx(13.3), pytest.approx(26.6)]
    # One on its way: the second send, at 4.3, waits for the first message, at 11.
    assert forwards(1) == [pytest.approx(0), pytest.approx(3.3), pytest.approx(13.3)]
    assert forwards(9) == [pytest.approx(0), pytest.approx(3.3), pytest.approx(6.6)]


def test_bytes_relayed():
    # Window 3 over 5 stages: stages relay 0, 1, 2, 2, 1 bundles; all but the last send a forward.
    program = training_program(GradientFlowPlan.n_wise(5, 3), 4)
    sizes = CostModel(forward_bytes=100.0, gradient_bytes=7.0)
    assert simulate(program, sizes).relay_bytes == (0.0, 28.0, 56.0, 56.0, 28.0)


def test_peak_in_flight():
    global_ = training_program(GradientFlowPlan.end_to_end(5), 8)
    assert simulate(global_).in_flight == (5, 4, 3, 2, 1)
    few = training_program(GradientFlowPlan.end_to_end(5), 2)
    assert simulate(few).in_flight == (2, 2, 2, 2, 1)
    assert simulate(training_program(GradientFlowPlan.local(3), 4)).in_flight == (1, 1, 1)
    assert simulate(training_program(GradientFlowPlan.n_wise(4, 2), 4)).in_flight == (2, 2, 2, 1)
    evaluation = evaluation_program(GradientFlowPlan.n_wise(4, 2), 4, all_heads=True)
    assert simulate(evaluation).in_flight == (1, 1, 1, 1)
    fractional = GradientFlowPlan.n_wise(window=1.25, stage_bounds=bounds_of(3, 4))
    assert simulate(training_program(fractional, 4)).in_flight == (2, 2, 1)


def test_a_fractional_window_costs_less_than_a_whole_one():
    def seconds(window):
        plan = GradientFlowPlan.n_wise(window=window, stage_bounds=bounds_of(8, 4))
        return simulate(training_program(plan, 16)).batch_seconds

    assert seconds(1) < seconds(1.25) < seconds(1.5) < seconds(2) < seconds(3)


def test_the_slowest_stage_sets_the_pace():
    slow = CostModel(forward=(1.0, 4.0, 1.0))
    assert simulate(training_program(GradientFlowPlan.local(3), 2), slow).batch_seconds == pytest.approx(
        2 * 6.3
    )


def test_a_standstill_says_who_waits():
    # Both stages want to receive before they do what the other waits for.
    program = training_program(GradientFlowPlan.end_to_end(2), 1)
    behind = [a for a in program.stages[1] if a.kind is not Kind.SEND_GRADIENT]
    with pytest.raises(
        StandstillError, match="the stages wait for each other: none of 0W0 can start"
    ) as error:
        simulate(replace(program, stages=(program.stages[0], tuple(behind))))
    assert error.value.places == ((0, program.stages[0].index(Action.parse("0W0"))),)


def test_at_least_one_batch():
    with pytest.raises(ScheduleError, match="num_batches is 0"):
        simulate(training_program(GradientFlowPlan.local(2), 1), num_batches=0)


@quick
@given(plans(max_stages=6), st.integers(1, 5), st.integers(0, 2), st.data())
def test_every_program_runs_under_any_costs(plan, num_micro_batches, extra, data):
    program = training_program(plan, num_micro_batches, extra_in_flight=extra)
    chosen = data.draw(costs(plan.num_stages))
    hardest = simulate(program, chosen, send_ahead=0, num_batches=2)
    streaming = simulate(program, chosen, num_batches=3)
    flushed = simulate(program, chosen, num_batches=3, streaming=False)
    work = [sum(chosen.seconds(plan, action) for action in actions) for actions in program.stages]
    assert streaming.batch_seconds >= max(work) - 1e-9
    assert _end(streaming) <= _end(flushed) + 1e-9
    assert _end(simulate(program, chosen, num_batches=2)) <= _end(hardest) + 1e-9
    for stage, spans in enumerate(streaming.spans):
        assert all(a.end <= b.start + 1e-9 for a, b in zip(spans, spans[1:], strict=False))
        assert sum(span.end - span.start for span in spans) == pytest.approx(3 * work[stage])
        assert streaming.in_flight[stage] <= plan.in_flight(stage) + extra


def _end(simulation):
    return max(spans[-1].end for spans in simulation.spans)
