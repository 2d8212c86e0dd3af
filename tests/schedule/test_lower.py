"""Loads, sends, receives and the end of a batch, around the work of every stage."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import bounds_of, lowered, plans, quick

from ds_interlock.schedule import GradientFlowPlan, evaluation_program, training_program
from ds_interlock.schedule.action import RECV_KINDS, Action, Kind
from ds_interlock.schedule.dependency import receive_of, receives_needed, send_of


def _texts(program):
    return [" ".join(str(action)[1:] for action in actions) for actions in program.stages]


def test_local():
    assert _texts(training_program(GradientFlowPlan.local(2), 3)) == [
        "LOAD0 F0 SEND_F0 H0@0 W0 LOAD1 F1 SEND_F1 H1@0 W1 LOAD2 F2 SEND_F2 H2@0 W2 REDUCE3 S3",
        # Two receives are posted ahead; the third once the first message has been taken.
        "RECV_F0 RECV_F1 F0 RECV_F2 H0@1 W0 F1 H1@1 W1 F2 H2@1 W2 REDUCE3 S3",
    ]


def test_window_2_with_one_micro_batch():
    assert _texts(training_program(GradientFlowPlan.n_wise(3, 2), 1)) == [
        "RECV_I0@0 LOAD0 F0 SEND_F0 W0 REDUCE1 S1",
        "RECV_I0@1 RECV_F0 F0 SEND_F0 H0@0 I0@0 SEND_I0@0 W0 REDUCE1 S1",
        "RECV_F0 F0 H0@1 I0@1 SEND_I0@1 W0 REDUCE1 S1",
    ]


def test_global_sends_the_gradient_its_backward_makes():
    assert _texts(training_program(GradientFlowPlan.end_to_end(2), 1)) == [
        "RECV_I0@0 LOAD0 F0 SEND_F0 W0 REDUCE1 S1",
        "RECV_F0 F0 H0@0 B0 SEND_I0@0 REDUCE1 S1",
    ]


def test_fractional_window_sends_the_relay_before_the_rest_of_the_forward():
    plan = GradientFlowPlan.n_wise(window=1.5, stage_bounds=bounds_of(2, 4))
    assert _texts(training_program(plan, 1)) == [
        "RECV_I0@0 LOAD0 F0 SEND_F0 W0 REDUCE1 S1",
        "RECV_F0 F0@0 H0@0 I0@0 SEND_I0@0 F0 H0@1 W0 REDUCE1 S1",
    ]


def test_a_sum_of_losses_travels_as_one_message():
    plan = GradientFlowPlan.deep_supervision(3)
    assert "SEND_I0@1+2" in _texts(training_program(plan, 1))[1]
    assert "RECV_I0@1+2" in _texts(training_program(plan, 1))[0]


def test_a_stage_of_one_has_nobody_to_talk_to():
    assert _texts(training_program(GradientFlowPlan.local(1), 2)) == [
        "LOAD0 F0 H0@0 W0 LOAD1 F1 H1@0 W1 REDUCE2 S2"
    ]


@pytest.mark.parametrize(
    ("all_heads", "expected"),
    [
        (False, ["LOAD0 F0 SEND_F0 LOAD1 F1 SEND_F1", "RECV_F0 RECV_F1 F0@0 F0 H0@1 F1@0 F1 H1@1"]),
        (True, ["LOAD0 F0 SEND_F0 LOAD1 F1 SEND_F1", "RECV_F0 RECV_F1 F0@0 F0 H0@0 H0@1 F1@0 F1 H1@0 H1@1"]),
    ],
)
def test_evaluation_is_forward_only(all_heads, expected):
    plan = GradientFlowPlan.n_wise(window=1.5, stage_bounds=bounds_of(2, 4))
    program = evaluation_program(plan, 2, all_heads=all_heads)
    assert _texts(program) == expected
    assert program.slots == (1, 1)


def test_buffers_go_round():
    program = training_program(GradientFlowPlan.n_wise(4, 3), 8, extra_in_flight=1)
    assert program.slots == (4, 4, 3, 2)
    assert [program.buffer(Action(2, Kind.FORWARD, number)) for number in range(5)] == [0, 1, 2, 0, 1]
    assert program.buffer(Action(0, Kind.WEIGHT_GRADIENT, 7)) == 3


@pytest.mark.parametrize(
    ("action", "send", "receive"),
    [
        ("1F2", "1SEND_F2", "2RECV_F2"),
        ("1I2@0", "1SEND_I2@0", "0RECV_I2@0"),
        ("3F2", None, None),  # the last stage
        ("1H2@0", None, None),
        ("1W2", None, None),
        ("1S4", None, None),
    ],
)
def test_what_an_action_sends(action, send, receive):
    found = send_of(GradientFlowPlan.n_wise(4, 2), Action.parse(action))
    assert (found and str(found)) == send
    assert (found and str(receive_of(found))) == receive


def test_only_a_whole_forward_is_sent_on():
    plan = GradientFlowPlan.n_wise(window=1.5, stage_bounds=bounds_of(3, 4))
    assert send_of(plan, Action.parse("1F0@0")) is None
    assert str(send_of(plan, Action.parse("1F0"))) == "1SEND_F0"


def _most_untaken(plan, actions, kind):
    """How many messages of a link a stage has posted receives for that its work has not taken, at most."""
    untaken, most = set(), 0
    for action in actions:
        untaken |= {action} if action.kind is kind else set()
        untaken -= set(receives_needed(plan, action))
        most = max(most, len(untaken))
    return most


@quick
@given(plans(), st.integers(1, 7), st.integers(0, 3), st.integers(2, 4))
def test_messages_match_and_receives_are_posted_a_little_ahead(plan, num_micro_batches, extra, ahead):
    program = lowered(plan, num_micro_batches, extra, receive_ahead=ahead)
    for stage, actions in enumerate(program.stages):
        for kind in (Kind.SEND_FORWARD, Kind.SEND_GRADIENT):
            sent = [receive_of(action) for action in actions if action.kind is kind]
            if sent:
                other = program.stages[sent[0].stage]
                assert sent == [action for action in other if action.kind is sent[0].kind]
        posted, taken = [], []
        for action in actions:
            if action.kind in RECV_KINDS:
                posted.append(action)
            for receive in receives_needed(plan, action):
                # A gradient may be taken twice: for the weights and for the relay.
                taken += [] if receive in taken else [receive]
                assert receive in posted
        assert sorted(posted) == sorted(taken)
        for kind in RECV_KINDS:
            one_link = [action for action in taken if action.kind is kind]
            if one_link == [action for action in posted if action.kind is kind]:
                assert _most_untaken(plan, actions, kind) <= ahead
        assert [action.kind for action in actions[-2:]] == [Kind.REDUCE, Kind.STEP]
        assert sum(action.kind is Kind.LOAD for action in actions) == (0 if stage else num_micro_batches)
