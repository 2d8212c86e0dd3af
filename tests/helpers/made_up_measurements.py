"""What made-up experiments say of how well settings learn, in place of the package's file."""

from pathlib import Path
from typing import Any

import pytest

from ds_interlock.planning import quality
from ds_interlock.planning.quality import Measurement, Measurements, Spread

LOCAL = {"mode": "local"}
PHASES = [{"from_step": 0, "window": 1}, {"from_step": 400, "window": 2}]


def measured(
    section: dict[str, Any],
    share: float,
    steps: float | None = None,
    gain: float | None = None,
    deviation: float | None = 0.001,
    **values: Any,
) -> Measurement:
    """Three seeds of "prose", 8 blocks of width 64 in 8 stages; steps, share and gain have one deviation."""
    return Measurement(
        **{
            "experiment": "prose",
            "mode": "a mode",
            "model": "8 Transformer blocks of width 64",
            "is_language": True,
            "model_size": 8 * 64**2,
            "num_stages": 8,
            "budget": 1000,
            "seeds": (0, 1, 2),
            "interlock": section,
            "share": Spread(mean=share, deviation=deviation),
            "steps": None if steps is None else Spread(mean=steps, deviation=deviation),
            "most_steps": 1.25,
            "local": "local",
            "gain": None if gain is None else Spread(mean=gain, deviation=deviation),
            **values,
        }
    )


def window(size: float, **keys: Any) -> dict[str, Any]:
    return {"mode": "interlock", "window": size, **keys}


PROSE = (
    measured(LOCAL, 0.0),
    measured(window(1.5, head={"learning_rate_scale": 10.0}), -0.12, gain=-0.008),
    measured(window(2), 0.70, steps=1.1, gain=0.04),
    measured(window(3), 0.84, steps=1.05, gain=0.05),
    measured({"schedule": PHASES}, 0.59, steps=1.2, gain=0.03),
)


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, *measurements: Measurement) -> None:
    """The planner knows ``measurements`` and no others."""
    file = folder / "measured.json"
    file.write_text(Measurements(measurements=measurements).model_dump_json())
    monkeypatch.setattr(quality, "FILE", file)
    quality._measurements.cache_clear()  # of what was in the file before
