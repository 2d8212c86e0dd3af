"""The table of what settings learn, held to the results files that docs/results.md is made from."""

from pathlib import Path

import pytest

from ds_interlock.config import InterlockConfig
from ds_interlock.planning.quality import MEASURED, beats_local, gap_recovered, measurement
from experiments import comparison

RESULTS = Path(__file__).parents[2] / "docs" / "experiments"


@pytest.mark.parametrize("key", MEASURED, ids=str)
def test_it_says_what_the_experiments_say(key: tuple[float, str, bool]) -> None:
    measured = MEASURED[key]
    runs = comparison.read(RESULTS / f"{measured.experiment}.jsonl", order=[])
    assert measured.share == pytest.approx(runs.recovered(measured.mode).mean, abs=0.0051)
    section = runs.run_of(measured.mode).section
    # In "transformer" a stage has two layers, and a head within it is in its middle.
    window = 1.5 if key[0] == 1.25 else key[0]
    assert ((section.window or 1), section.combine, bool(section.head.blocks)) == (window, *key[1:])
    assert section.head_stride == 1


def test_what_was_not_measured_is_no_number() -> None:
    assert measurement(InterlockConfig(mode="interlock", window=2, head_stride=2)) is None
    assert gap_recovered(InterlockConfig(mode="interlock", window=2.5)) is None
    assert gap_recovered(InterlockConfig(mode="local")) == 0
    assert gap_recovered(InterlockConfig(head={"blocks": 1})) == 1
    assert beats_local(InterlockConfig(mode="interlock", window=1.5)) is False
    assert beats_local(InterlockConfig(mode="interlock", window=3)) is True
