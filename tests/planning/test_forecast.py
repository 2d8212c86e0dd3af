"""Forecasts: what the simulator says, put in the planner's terms."""

import pytest
from profiles import profile

from ds_interlock.config import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.planning.forecast import GLOBAL, ZERO_BUBBLE, compare, forecast, setting_name
from ds_interlock.planning.profile import unit_profile
from ds_interlock.schedule import simulate, training_program

WINDOW_2 = InterlockConfig(mode="interlock", window=2)


def compared(interlock, profile, num_micro_batches, num_stages):
    return compare(interlock, profile, profile.balanced_bounds(num_stages), num_micro_batches)


def by_name(comparison):
    return {each.name: each for each in comparison.all}


def test_units_on_eight_stages_are_those_of_the_simulator_by_hand():
    # A stage's passes take 1 each, a head 0.3. Per micro-batch: local F H W = 3.3, window 2 F H I W = 4.3.
    found = by_name(compared(WINDOW_2, unit_profile(32, 4), 4, 8))
    assert found[GLOBAL].batch_seconds == pytest.approx(3 * (4 + 7))
    assert found["local"].batch_seconds == pytest.approx(4 * 3.3)
    assert found["window 2"].batch_seconds == pytest.approx(4 * 4.3)
    ahead = InterlockConfig(mode="interlock", window=1.25, extra_in_flight=1)
    found |= by_name(compared(ahead, unit_profile(32, 4), 4, 8))
    assert found["window 1.25, 1 extra"].batch_seconds == pytest.approx(4 * 3.55)
    # A block of a head costs what a layer costs, 3 / 4.
    assert found["local, 1 block"].batch_seconds == pytest.approx(4 * (3.3 + 0.75))
    assert found["local"].speed == pytest.approx(33 / 13.2)
    assert found[GLOBAL].speed == 1.0


def test_a_forecast_is_the_simulation_of_its_setting():
    interlock = InterlockConfig(mode="interlock", window=1.5, extra_in_flight=1)
    p, bounds = profile(8), [0, 2, 4, 6, 8]
    each = forecast(interlock, p, bounds, 5)
    program = training_program(interlock.plan(bounds), 5, extra_in_flight=1)
    simulation = simulate(program, p.cost_model(bounds))
    assert each.batch_seconds == simulation.batch_seconds
    assert each.bubble_fraction == simulation.bubble_fraction
    assert each.in_flight == simulation.in_flight
    assert each.name == "window 1.5, 1 extra"


def test_ties_that_are_kept_equal_end_streaming_where_stages_share_them():
    p, bounds = profile(8, tied_layers=(0, 7)), [0, 2, 4, 6, 8]
    sync = WINDOW_2.model_copy(update={"tied_weights": "sync"})
    flushed = WINDOW_2.model_copy(update={"streaming": False})
    assert forecast(sync, p, bounds, 2).spans == forecast(flushed, p, bounds, 2).spans
    assert forecast(sync, p, bounds, 2).batch_seconds > forecast(WINDOW_2, p, bounds, 2).batch_seconds
    within_a_stage = profile(8, tied_layers=(2, 3))
    assert forecast(sync, within_a_stage, bounds, 2).spans == forecast(WINDOW_2, p, bounds, 2).spans
    found = by_name(compare(sync, p, bounds, 2))
    local = InterlockConfig(mode="local", streaming=False)
    assert found["local"].spans == forecast(local, p, bounds, 2).spans
    assert compare(sync, p, bounds, 2).syncs_ties
    assert not compare(WINDOW_2, p, bounds, 2).syncs_ties


def test_memory_and_traffic_of_every_stage():
    p, bounds = profile(8), [0, 2, 4, 6, 8]
    each = forecast(WINDOW_2, p, bounds, 5)
    assert each.in_flight == (2, 2, 2, 1)
    kept = p.activation_bytes(bounds)
    assert each.activation_bytes == tuple(n * b for n, b in zip((2, 2, 2, 1), kept, strict=True))
    # Window 2 relays one gradient a micro-batch from stages 1 to 3; the state in front of 2 is 11 bytes.
    assert each.relay_bytes == (0.0, 5 * 11.0, 5 * 13.0, 5 * 15.0)


def test_the_share_of_heads_counts_auxiliary_heads_only():
    p = unit_profile(4, 1, head_share=0.5)
    local = forecast(InterlockConfig(mode="local"), p, [0, 1, 2, 3, 4], 3)
    assert local.head_share == pytest.approx(3 * 0.5 / (4 * 3 + 3 * 0.5))
    assert forecast(InterlockConfig(), p, [0, 1, 2, 3, 4], 3).head_share == 0.0


def test_global_waits_for_the_optimizer_and_local_does_not_wait_for_anybody():
    p = profile(4, latency_seconds=0.0, bandwidth_bytes_per_second=None, loss_seconds=0.0, head_seconds=0.0)
    local = forecast(InterlockConfig(mode="local"), p, [0, 1, 2, 3, 4], 2)
    slowest = max(2 * l.forward_seconds * 3 + l.optimizer_seconds for l in p.layers)  # noqa: E741
    assert local.batch_seconds == pytest.approx(slowest + 0.02)  # and the head's step


def test_the_zero_bubble_line_is_a_reference_only():
    found = by_name(compared(WINDOW_2, unit_profile(8, 1), 8, 8))
    assert found[ZERO_BUBBLE].is_reference
    assert found[ZERO_BUBBLE].batch_seconds == pytest.approx(3 * 8 + 7)
    assert found[ZERO_BUBBLE].in_flight == (8,) * 8
    assert not found[GLOBAL].is_reference


def test_all_settings_have_the_stages_that_are_given():
    forecasts = compare(WINDOW_2, profile(6), [0, 1, 6], 2).all
    assert {each.plan.stage_bounds for each in forecasts} == {(0, 1, 6)}


def test_settings_that_do_not_exist_are_left_out_with_the_reason():
    comparison = compared(WINDOW_2, unit_profile(2, 1), 2, 2)
    assert [each.name for each in comparison.all] == [
        "window 2",
        GLOBAL,
        ZERO_BUBBLE,
        "local",
        "window 2, stride 2",
        "local, 1 block",
        "window 2, 1 block",
    ]
    assert "window 3: gradient-flow plan: window is 3" in "\n".join(comparison.skipped)
    with pytest.raises(ConfigError, match="needs a head within stage 1"):
        compared(InterlockConfig(mode="interlock", window=1.25), unit_profile(2, 1), 2, 2)


def test_one_stage_is_compared_with_global_alone():
    comparison = compared(WINDOW_2, unit_profile(2, 2), 2, 1)
    assert [each.name for each in comparison.all] == ["window 2", GLOBAL, ZERO_BUBBLE]
    assert all(each.speed == 1 for each in comparison.all)


def test_the_configured_setting_comes_once_and_first():
    comparison = compared(InterlockConfig(mode="local"), unit_profile(8, 2), 2, 4)
    names = [each.name for each in comparison.all]
    assert names[0] == "local"
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({}, GLOBAL),
        ({"mode": "local"}, "local"),
        ({"mode": "interlock", "window": 1, "head": {"blocks": [1]}}, "local, 1 block"),
        ({"mode": "interlock", "window": 2, "head": {"blocks": [2, 1]}}, "window 2, 2-1 blocks"),
        ({"mode": "interlock", "window": 2.5, "combine": "farthest"}, "window 2.5, farthest"),
        ({"mode": "interlock", "window": 3, "head_stride": 2}, "window 3, stride 2"),
        ({"mode": "local", "streaming": False, "extra_in_flight": 2}, "local, 2 extra, no streaming"),
    ],
)
def test_names_of_settings(section, name):
    assert setting_name(InterlockConfig.model_validate(section)) == name


@pytest.mark.bad_input
def test_bounds_of_another_model():
    with pytest.raises(ConfigError, match="do not end at 8"):
        compare(WINDOW_2, profile(8), [0, 2, 4], 2)


@pytest.mark.bad_input
def test_a_configured_window_that_is_too_long():
    with pytest.raises(ConfigError, match=r"interlock\.window 3.*2 stages"):
        compared(InterlockConfig(mode="interlock", window=3), profile(8), 2, 2)
