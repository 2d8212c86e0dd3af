"""How well settings were measured to learn, so that none is recommended for its speed alone.

    share = (local - setting) / (local - global)      of the losses at the end of a budget; 1: as global

The numbers are those of docs/results.md, from one experiment for each setting, and a test holds them to its
files. Local is the experiment's mode "local", whose heads have no blocks.
"""

from typing import NamedTuple

from ds_interlock.config import InterlockConfig


class Measurement(NamedTuple):
    """What an experiment says of a setting."""

    share: float
    """Of the gap between local and global that the setting closes; below 0 it is worse than local."""
    experiment: str
    mode: str
    """What the experiment calls the setting."""
    where: str


_TRANSFORMER = "8 Transformer blocks in 8 stages"

MEASURED: dict[tuple[float, str, bool], Measurement] = {
    (1.25, "sum", False): Measurement(-0.12, "transformer", "window 1.5", _TRANSFORMER),  # the same there
    (1.5, "sum", False): Measurement(-0.12, "transformer", "window 1.5", _TRANSFORMER),
    (2, "sum", False): Measurement(0.70, "transformer", "window 2", _TRANSFORMER),
    (3, "sum", False): Measurement(0.84, "transformer", "window 3", _TRANSFORMER),
    (2, "farthest", False): Measurement(-4.78, "slow_heads", "window 2, farthest", _TRANSFORMER),
    (3, "farthest", False): Measurement(-3.99, "slow_heads", "window 3, farthest", _TRANSFORMER),
}
"""By window, combine and whether heads have blocks."""


def measurement(interlock: InterlockConfig) -> Measurement | None:
    """What was measured of a setting; None if nothing, and for global. No head stride was measured."""
    if interlock.is_global:
        return None
    key = (interlock.window or 1, interlock.combine, _has_blocks(interlock))
    return MEASURED.get(key) if interlock.head_stride == 1 else None


def gap_recovered(interlock: InterlockConfig) -> float | None:
    """The share of the gap that a setting closes, for global and local by definition; None: not measured."""
    if measured := measurement(interlock):
        return measured.share
    is_local = interlock.mode == "local" and not _has_blocks(interlock)
    return 1.0 if interlock.is_global else 0.0 if is_local else None


def beats_local(interlock: InterlockConfig) -> bool | None:
    """Whether the setting learned better than local with such heads; None: not measured."""
    share = gap_recovered(interlock)
    of_local = gap_recovered(InterlockConfig(mode="local", head=interlock.head))
    return None if share is None or of_local is None else share > of_local


def _has_blocks(interlock: InterlockConfig) -> bool:
    blocks = interlock.head.blocks
    return blocks > 0 if isinstance(blocks, int) else any(blocks)
