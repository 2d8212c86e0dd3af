"""Layers to stages: contiguous, and the slowest stage as fast as can be."""

from collections.abc import Sequence

from ds_interlock.errors import ConfigError


def balanced_bounds(seconds: Sequence[float], num_stages: int) -> list[int]:
    """Stage bounds under which the slowest stage is fastest; ties go to the evener cut.

    Raises:
        ConfigError: If there are fewer layers than stages.
    """
    num_layers = len(seconds)
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"{num_stages} stages for {num_layers} layers: every stage needs at least one")
    ends = [0.0]
    for value in seconds:
        ends.append(ends[-1] + value)
    # slowest[n]: of the best cut of the first n layers into the stages so far (time, sum of squares).
    best: list[list[tuple[float, float]]] = [[(0.0, 0.0)] + [(float("inf"), 0.0)] * num_layers]
    cuts: list[list[int]] = []
    for stage in range(1, num_stages + 1):
        row, cut = [(float("inf"), 0.0)] * (num_layers + 1), [0] * (num_layers + 1)
        for stop in range(stage, num_layers + 1):
            for start in range(stage - 1, stop):
                slowest, squares = best[-1][start]
                own = ends[stop] - ends[start]
                candidate = max(slowest, own), squares + own * own
                if candidate < row[stop]:
                    row[stop], cut[stop] = candidate, start
        best.append(row)
        cuts.append(cut)
    bounds = [num_layers]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return bounds[::-1]
