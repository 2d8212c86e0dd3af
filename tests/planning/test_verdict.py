"""The honest sentence, held to the simulator."""

import math

import pytest
from profiles import profile

from ds_interlock.config import InterlockConfig
from ds_interlock.planning.forecast import compare
from ds_interlock.planning.profile import HeadProfile, unit_profile
from ds_interlock.planning.verdict import best_interlock, pays, verdict
from ds_interlock.schedule import GradientFlowPlan, simulate, training_program

WINDOWS = (2, 3)  # that were measured to learn better than local
LAYERS = 4
BOUNDS = [LAYERS * stage for stage in range(5)]


def units(window: float | None, num_micro_batches: int) -> float:
    """Straight from the simulator, past the planner: None is global."""
    if window is None:
        plan = GradientFlowPlan.end_to_end(stage_bounds=BOUNDS)
    else:
        plan = GradientFlowPlan.n_wise(None, window, stage_bounds=BOUNDS)
    return min(
        simulate(
            training_program(plan, num_micro_batches, extra_in_flight=n), streaming=window is not None
        ).batch_seconds
        for n in (0, 1)
    )


def compared(num_micro_batches: int, **section):
    interlock = InterlockConfig(mode="interlock", **section)
    return compare(interlock, unit_profile(BOUNDS[-1], LAYERS), BOUNDS, num_micro_batches)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4, 8, 16, 32])
def test_it_says_what_the_simulator_says(num_micro_batches):
    gain = units(None, num_micro_batches) / min(units(window, num_micro_batches) for window in WINDOWS)
    comparison = compared(num_micro_batches, window=2)
    assert pays(comparison) == (gain >= 1.05)
    assert best_interlock(comparison).speed == pytest.approx(gain, rel=0.01)
    text = verdict(comparison)
    assert text.startswith("Interlocking pays") == (gain >= 1.05)
    assert ("does not pay" in text) == (gain < 1)


def test_window_3_with_many_micro_batches_does_not_pay_and_it_says_so():
    assert units(3, 32) > units(None, 32)  # the simulator
    comparison = compared(32, window=3)
    assert not pays(comparison)
    text = verdict(comparison)
    assert text.startswith("Interlocking does not pay with 32 micro-batches on 4 stages")
    assert (
        f"The configured setting, window 3, has {units(None, 32) / units(3, 32):.2f} times its speed" in text
    )


def test_a_zero_bubble_schedule_that_would_be_better_is_named():
    assert "ZB-H1" in verdict(compared(16, window=2))
    assert "ZB-H1" not in verdict(compared(1, window=2))


def test_what_learns_no_better_than_local_is_not_recommended():
    comparison = compared(4, window=1.25)
    assert comparison.configured.speed > best_interlock(comparison).speed, "the test must be able to tell"
    text = verdict(comparison)
    assert text.startswith("Interlocking pays with 4 micro-batches on 4 stages: window 2 (")
    of_transformer = 'in our experiment "transformer", 8 Transformer blocks in 8 stages.'
    assert f". Window 2 made up for 70% of what local loses {of_transformer}" in text
    assert text.endswith(f"times its speed, and learned no better than local {of_transformer}")
    fractional = compare(InterlockConfig(mode="interlock", window=1.25), unit_profile(8, 4), [0, 4, 8], 4)
    assert best_interlock(fractional) is None
    gaps = {each.name: each.gap_recovered for each in comparison.all}
    assert [gaps[name] for name in ("global (1F1B)", "global (ZB-H1)", "local")] == [1, 1, 0]


def test_local_is_never_sold_as_interlocking():
    interlock = InterlockConfig(mode="local")
    comparison = compare(interlock, unit_profile(16, 4), BOUNDS, 4)
    assert best_interlock(comparison).window > 1
    assert "only local" in verdict(comparison)


def test_dear_heads_are_named():
    interlock = InterlockConfig(mode="interlock", window=2)
    dear = compare(interlock, unit_profile(16, 4, head_share=3.0), BOUNDS, 4)
    assert "interlock.head.token_fraction" in verdict(dear)
    assert "interlock.head.token_fraction" not in verdict(compared(4, window=2))


def test_copies_that_take_too_long_are_named():
    """Three links of 1 s and a micro-batch of local on a stage of 4 layers, with its head and step."""
    interlock = InterlockConfig(mode="local", head={"type": "shared", "refresh_every": 3})
    shared = HeadProfile(type="shared", seconds=0.0, copy_bytes=1e6)
    comparison = compare(interlock, profile(16, head=shared, latency_seconds=0.0), BOUNDS, 1)
    batch = comparison.configured.batch_seconds
    assert comparison.configured.refresh_at_least == math.ceil(3 * (1 + 1 / batch)) == 4
    assert "refresh_every 3 the configured setting waits for copies of the unembedding: set it to 4 or" in (
        verdict(comparison)
    )
    enough = InterlockConfig(mode="local", head={"type": "shared", "refresh_every": 4})
    comparison = compare(enough, profile(16, head=shared, latency_seconds=0.0), BOUNDS, 1)
    assert "refresh_every" not in verdict(comparison)
    assert [each.copy_bytes for each in comparison.all[:2]] == [1e6, 0.0]  # global has no heads


def test_one_stage_has_nothing_to_interlock():
    comparison = compare(InterlockConfig(), unit_profile(4, 4), [0, 4], 1)
    assert best_interlock(comparison) is None
    assert verdict(comparison).startswith("With 1 micro-batch on 1 stage there is nothing to interlock")
