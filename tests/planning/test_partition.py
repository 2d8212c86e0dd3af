"""Layers to stages: the slowest stage is as fast as can be."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_interlock.errors import ConfigError
from ds_interlock.planning.profile import balanced_bounds


def slowest(seconds: list[float], bounds: list[int]) -> float:
    return max(sum(seconds[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_no_cut_is_better(seconds, data):
    num_stages = data.draw(st.integers(1, len(seconds)))
    bounds = balanced_bounds(seconds, num_stages)
    cuts = combinations(range(1, len(seconds)), num_stages - 1)
    best = min(slowest(seconds, [0, *cut, len(seconds)]) for cut in cuts)
    assert slowest(seconds, bounds) == best
    assert bounds[0] == 0
    assert bounds[-1] == len(seconds)
    assert all(a < b for a, b in zip(bounds, bounds[1:], strict=False))


def test_equal_layers_are_cut_evenly():
    assert balanced_bounds([1.0] * 12, 4) == [0, 3, 6, 9, 12]


def test_a_heavy_last_layer_stands_alone():
    assert balanced_bounds([1, 1, 1, 1, 4], 2) == [0, 4, 5]


@pytest.mark.bad_input
@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_layers(num_stages):
    with pytest.raises(ConfigError, match=f"{num_stages} stages for 3 layers"):
        balanced_bounds([1.0, 1.0, 1.0], num_stages)
