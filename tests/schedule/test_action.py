"""The text form of actions: what it looks like, that it can be read back, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_strategies import quick

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import Action, Kind


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("2F0", Action(2, Kind.FORWARD, 0)),
        ("2F0@3", Action(2, Kind.FORWARD, 0, (3,))),
        ("12H34@5", Action(12, Kind.HEAD, 34, (5,))),
        ("2I0@3+4+11", Action(2, Kind.INPUT_GRADIENT, 0, (3, 4, 11))),
        ("0W7", Action(0, Kind.WEIGHT_GRADIENT, 7)),
        ("1B1", Action(1, Kind.BACKWARD, 1)),
        ("3S8", Action(3, Kind.STEP, 8)),
        ("0LOAD2", Action(0, Kind.LOAD, 2)),
        ("1SEND_F0", Action(1, Kind.SEND_FORWARD, 0)),
        ("2RECV_F0", Action(2, Kind.RECV_FORWARD, 0)),
        ("2SEND_I1@1+2", Action(2, Kind.SEND_GRADIENT, 1, (1, 2))),
        ("1RECV_I1@1+2", Action(1, Kind.RECV_GRADIENT, 1, (1, 2))),
        ("1REDUCE4", Action(1, Kind.REDUCE, 4)),
    ],
)
def test_text_form(text, action):
    assert str(action) == text
    assert Action.parse(text) == action


@quick
@given(
    stage=st.integers(0, 10**4),
    kind=st.sampled_from(Kind),
    micro_batch=st.integers(0, 10**4),
    losses=st.lists(st.integers(0, 300), unique=True, max_size=5).map(sorted).map(tuple),
)
def test_what_prints_parses(stage, kind, micro_batch, losses):
    action = Action(stage, kind, micro_batch, losses)
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize(
    "text",
    [
        "",
        "F0",
        "2F",
        "2X0",
        "2f0",
        "-1F0",
        "2F0@",
        "2F0@1+",
        "2F0@+1",
        "2F0 ",
        " 2F0",
        "2F0\n",
        "2SEND0",
        "2F0F1",
    ],
)
def test_other_text_is_refused(text):
    with pytest.raises(ScheduleError) as error:
        Action.parse(text)
    assert repr(text) in str(error.value)
    assert "expected a form like 2F0" in str(error.value)
