"""Layers to stages: contiguous, and the slowest stage as fast as can be."""

from collections.abc import Sequence
from itertools import accumulate

from ds_interlock.errors import ConfigError


def balanced_bounds(seconds: Sequence[float], num_stages: int) -> list[int]:
    """Stage bounds under which the slowest stage is fastest; ties go to the evener cut.

    ConfigError if there are fewer layers than stages.
    """
    num_layers = len(seconds)
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"{num_stages} stages for {num_layers} layers: every stage needs at least one")
    ends = [0.0, *accumulate(seconds)]
    # Of the best cut of some first layers into the stages so far: slowest stage, sum of squares, bounds.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}

    def with_stage(start: int, stop: int) -> tuple[float, float, list[int]]:
        slowest, squares, bounds = best[start]
        own = ends[stop] - ends[start]
        return max(slowest, own), squares + own * own, [*bounds, stop]

    for stage in range(1, num_stages + 1):
        best = {
            stop: min((with_stage(start, stop) for start in best if start < stop), key=lambda cut: cut[:2])
            for stop in range(stage, num_layers + 1)
        }
    return best[num_layers][2]
