"""Forecasts for people and for programs: a table, JSON, an SVG, a trace."""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ds_interlock.files import replace_text
from ds_interlock.planning.forecast import Comparison, Forecast
from ds_interlock.planning.verdict import best_interlock, pays, verdict
from ds_interlock.schedule.render import Timeline, render_svg
from ds_interlock.schedule.simulate import from_zero
from ds_interlock.schedule.trace import chrome_trace

_BATCHES_IN_PICTURES = (1, 2)
"""The first to start while the pipeline is running, and the next."""

_NOT_IN_JSON = {"rows", "stage_bounds", "num_micro_batches"}


def unit_of(comparison: Comparison) -> str:
    """The unit of a comparison's times: seconds, or forwards of a stage where nothing was measured."""
    return "forwards" if comparison.profile.is_unit else "s"


def table(comparison: Comparison, forecasts: Sequence[Forecast]) -> Table:
    """One line per setting; the configured one is marked."""
    unit = unit_of(comparison)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("setting", no_wrap=True)
    columns = [f"batch ({unit})", "x global", "bubble", "heads", "in flight", "activations", "relays"]
    for name in columns:
        result.add_column(name, justify="right", no_wrap=True)
    for each in forecasts:
        name = f"{each.name} *" if each.name == comparison.configured.name else each.name
        result.add_row(
            f"[dim]{name}[/dim]" if each.is_reference else name,
            f"{each.batch_seconds:.4g}",
            f"{each.speed:.2f}",
            f"{each.bubble_fraction:.0%}",
            f"{each.head_share:.1%}",
            _by_stage(each.in_flight),
            _bytes(max(each.activation_bytes), comparison),
            _bytes(max(each.relay_bytes), comparison),
        )
    return result


def print_report(comparison: Comparison, forecasts: Sequence[Forecast], console: Console) -> None:
    """The table, the costs it is made from, how to cut a job so, and the verdict."""
    profile, reference = comparison.profile, comparison.reference
    bounds = ", ".join(map(str, reference.stage_bounds))
    batches = f"{reference.num_micro_batches} micro-batches per batch"
    say = partial(console.print, markup=False, soft_wrap=True)
    say(f"{profile.model}: {len(profile.layers)} layers, stage bounds {bounds}; {batches}")
    say(f"costs: {profile.source}")
    if not profile.is_unit:
        say(f"a job with these stages: --stage_bounds {bounds.replace(' ', '')}")
    console.print(table(comparison, forecasts))
    note = "In flight: micro-batches, by stage. Activations, relays: per batch, of the stage with the most."
    console.print(f"* configured. {note}", style="dim")
    for reason in comparison.skipped:
        say(f"left out: {reason}", style="dim")
    if comparison.syncs_ties:
        say('stages share weights, interlock.tied_weights is "sync": no setting streams', style="dim")
    say(f"\n{verdict(comparison)}")


def as_json(comparison: Comparison, forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """What ``--json`` prints: every forecast without its spans, and the verdict."""
    best = best_interlock(comparison)
    return {
        "model": comparison.profile.model,
        "costs": comparison.profile.source,
        "unit": unit_of(comparison),
        "num_stages": comparison.reference.num_stages,
        "num_micro_batches": comparison.reference.num_micro_batches,
        "stage_bounds": list(comparison.reference.stage_bounds),
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


def timelines(comparison: Comparison, forecasts: Iterable[Forecast]) -> list[Timeline]:
    """Two batches of each setting in the running pipeline, from a common zero."""
    unit = unit_of(comparison)
    return [
        Timeline(
            f"{each.name}: {each.batch_seconds:.4g} {unit} per batch",
            unit,
            from_zero([[span for span in row if span.batch in _BATCHES_IN_PICTURES] for row in each.rows]),
        )
        for each in forecasts
    ]


def write_svg(path: Path, comparison: Comparison, forecasts: Sequence[Forecast]) -> None:
    """Writes the timelines, one under the other, on one scale."""
    reference = comparison.reference
    title = f"{reference.num_micro_batches} micro-batches on {reference.num_stages} stages"
    replace_text(path, render_svg(timelines(comparison, forecasts), title=title))


def write_trace(path: Path, comparison: Comparison, forecasts: Sequence[Forecast]) -> None:
    """Writes the timelines as a Chrome trace."""
    trace = chrome_trace(timelines(comparison, forecasts), title=comparison.profile.model)
    replace_text(path, json.dumps(trace))


def _by_stage(numbers: Sequence[int]) -> str:
    """Every stage's number, or the range of them where there are many stages."""
    if len(set(numbers)) == 1:
        return str(numbers[0])
    if len(numbers) <= 8:
        return " ".join(map(str, numbers))
    return f"{numbers[0]} .. {numbers[-1]}"


def _bytes(size: float, comparison: Comparison) -> str:
    if comparison.profile.is_unit:
        return "-"  # nothing is known of sizes
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
