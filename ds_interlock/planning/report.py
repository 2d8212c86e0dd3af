"""Forecasts as JSON and as timelines, for pictures and traces."""

from collections.abc import Sequence
from typing import Any

from ds_interlock.planning.forecast import Comparison, Forecast
from ds_interlock.planning.verdict import best_interlock, pays, verdict
from ds_interlock.schedule.render import Timeline

_BATCHES_IN_PICTURES = (1, 2)
"""The first to start while the pipeline is running, and the next."""

_NOT_IN_JSON = {"spans", "plan"}


def unit_of(comparison: Comparison) -> str:
    """The unit of a comparison's times: seconds, or forwards of a stage where nothing was measured."""
    return "forwards" if comparison.profile.is_unit else "s"


def as_json(comparison: Comparison, forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """What ``--json`` prints: every forecast without its spans, and the verdict."""
    best = best_interlock(comparison)
    return {
        "model": comparison.profile.model,
        "costs": comparison.profile.source,
        "unit": unit_of(comparison),
        "num_stages": comparison.reference.plan.num_stages,
        "num_micro_batches": comparison.num_micro_batches,
        "stage_bounds": list(comparison.reference.plan.stage_bounds),
        "configured": comparison.configured.name,
        "settings": [
            {name: value for name, value in vars(each).items() if name not in _NOT_IN_JSON}
            for each in forecasts
        ],
        "skipped": list(comparison.skipped),
        "pays": pays(comparison),
        "best_interlock": best.name if best else None,
        "verdict": verdict(comparison),
    }


def timelines(comparison: Comparison, forecasts: Sequence[Forecast]) -> list[Timeline]:
    """Two batches of each setting in the running pipeline."""
    unit = unit_of(comparison)
    return [
        Timeline(
            f"{each.name}: {each.batch_seconds:.4g} {unit} per batch",
            unit,
            tuple(tuple(span for span in row if span.batch in _BATCHES_IN_PICTURES) for row in each.spans),
        )
        for each in forecasts
    ]
