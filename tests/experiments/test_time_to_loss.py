"""Time to a loss, with numbers worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.comparison import Curve
from experiments.efficiency import Phase, phase_sections, seconds_of, steps_within

CURVE = Curve((100, 200, 400), (3.0, 2.0, 1.0))
#: 100 batches of 1 s, 50 of 2 s, then 8 s each.
PHASES = [Phase(0, 1.0), Phase(100, 2.0), Phase(150, 8.0)]


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        (3.5, 100),  # there at the first evaluation already: when before that is not known
        (3.0, 100),
        (2.25, 175),  # 100 + 100 * 0.75
        (2.0, 200),
        (1.5, 300),  # 200 + 200 * 0.5
        (1.0, 400),
        (0.999, None),
    ],
)
def test_first_crossing(target: float, steps: float | None) -> None:
    assert CURVE.first_crossing(target) == steps


def test_the_first_of_several_crossings_counts() -> None:
    wavy = Curve((1, 2, 3, 4), (4.0, 2.0, 3.0, 1.0))
    assert wavy.first_crossing(2.5) == 1.75
    assert wavy.first_crossing(1.5) == 3.75


@pytest.mark.parametrize(("steps", "loss"), [(100, 3.0), (150, 2.5), (200, 2.0), (250, 1.75), (400, 1.0)])
def test_loss_between_points(steps: float, loss: float) -> None:
    assert CURVE.at(steps) == loss


@pytest.mark.parametrize(("steps", "loss"), [(99, 3.0), (401, 1.0)])
def test_outside_the_curve_its_nearest_point_counts(steps: float, loss: float) -> None:
    assert CURVE.at(steps) == loss


@pytest.mark.parametrize(
    ("steps", "seconds"), [(0, 0), (60, 60), (100, 100), (125, 150), (150, 200), (152.5, 220)]
)
def test_seconds_add_up_over_the_phases(steps: float, seconds: float) -> None:
    assert seconds_of(steps, PHASES) == seconds
    assert steps_within(seconds, PHASES) == steps


@given(
    lengths=st.lists(st.integers(1, 50), max_size=3),
    batch_seconds=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    steps=st.floats(0, 300),
)
def test_steps_within_is_the_inverse_of_seconds_of(
    lengths: list[int], batch_seconds: list[float], steps: float
) -> None:
    starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    phases = [Phase(start, taken) for start, taken in zip(starts, batch_seconds, strict=False)]
    assert steps_within(seconds_of(steps, phases), phases) == pytest.approx(steps, abs=1e-9)


def test_a_section_without_a_schedule_is_one_phase() -> None:
    section = {"mode": "interlock", "window": 3, "head": {"type": "linear"}}
    assert phase_sections(section) == [(0, section)]


def test_the_phases_of_a_schedule_keep_what_is_common() -> None:
    schedule = [
        {"from_step": 0, "window": 1},
        {"from_step": 2000, "window": 2, "combine": "sum"},
        {"from_step": 8000, "mode": "global"},
    ]
    # What is left out is the default: the mode of the last is global.
    assert phase_sections({"schedule": schedule, "combine": "farthest", "head": {"type": "linear"}}) == [
        (0, {"mode": "interlock", "window": 1, "combine": "farthest", "head": {"type": "linear"}}),
        (2000, {"mode": "interlock", "window": 2, "head": {"type": "linear"}}),
        (8000, {"combine": "farthest", "head": {"type": "linear"}}),
    ]
