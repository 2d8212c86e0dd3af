"""The forecasts as one HTML page: timelines of all settings, with a slider for M and one for K.

Everything is played through here, once for every position of the sliders, and written into the page
as JSON; the page only draws (``page.html``). Times become integers: ticks, of which the longest timeline
of a view has ``_TICKS``.

    view       one position of the sliders: K, M, seconds of a tick, the verdict, the forecasts and schedules
    forecast   the figures of one setting; for each stage a row; ``end``, where the shown batches end
    row        the number of the first batch, then four numbers a span:
               what (see ``actions``), micro-batch, ticks of waiting before it, ticks it takes
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ds_interlock.config import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.planning import forecast
from ds_interlock.planning.forecast import Comparison, Forecast, ScheduleForecast, setting_name
from ds_interlock.planning.profile import Profile
from ds_interlock.planning.verdict import verdict
from ds_interlock.schedule.render import COLOURS, LABELS, fill_template
from ds_interlock.schedule.simulate import Rows, Span

_NUM_STAGES = (2, 4, 8, 16)
_NUM_MICRO_BATCHES = (1, 2, 4, 8, 16)
_TICKS = 100_000

_MOST_PLAYED = 96  # micro-batches after which stages are assumed to run at a steady pace
_SLACK = 0.03  # what a batch may differ from its steady time, as a share of it
_MOST_FOR_TWO = 16  # a batch of more micro-batches is drawn once, not twice: the page stays small


def render_page(
    interlock: InterlockConfig, profile: Profile, stage_bounds: Sequence[int], num_micro_batches: int
) -> str:
    """The page, as HTML: one file that needs no network.

    The sliders are first at the number of stages of ``stage_bounds``, and at ``num_micro_batches``. For other
    numbers of stages the layers are cut as evenly as can be. ConfigError if the configured setting, the
    stages and the profile do not fit together.
    """
    stages, left_out = _stage_choices(interlock, profile, stage_bounds)
    micro_batches = sorted({*_NUM_MICRO_BATCHES, num_micro_batches})
    compared = interlock, *forecast.settings_to_compare(interlock)
    settings = {setting_name(setting): setting for setting in compared}
    maker = _Views(settings)
    positions = [*itertools.product(stages.values(), micro_batches)]
    views = [
        maker.view(forecast.compare(interlock, profile, bounds, m))
        for bounds, m in tqdm(positions, "positions of the sliders", leave=False, disable=None)
    ]
    names = dict.fromkeys([setting_name(interlock), forecast.GLOBAL, forecast.ZERO_BUBBLE, *settings])
    schedules = dict.fromkeys(name for view in views for name in view["schedules"])
    data = {
        "isUnit": profile.is_unit,
        "profile": profile.model_dump(mode="json", exclude={"layers", "head", "versions"}),
        "numLayers": len(profile.layers),
        "K": list(stages),
        "leftOut": left_out,
        "M": micro_batches,
        "configured": {"K": len(stage_bounds) - 1, "M": num_micro_batches, "name": setting_name(interlock)},
        "names": [name for name in names if any(name in view["forecasts"] for view in views)],
        "schedules": list(schedules),
        "kinds": {kind.value: label for kind, label in LABELS.items()},
        "actions": list(maker.actions),
        "views": views,
    }
    # In JSON no "<" is left that could end the script.
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    title = f"Pipeline plan: {profile.model}"
    return fill_template(__package__, "page.html", title=title, colours=COLOURS, data=content)


def _stage_choices(
    interlock: InterlockConfig, profile: Profile, stage_bounds: Sequence[int]
) -> tuple[dict[int, Sequence[int]], list[int]]:
    """Stage bounds by the numbers of stages that the configured setting exists for, and the other numbers."""
    choices, left_out = {interlock.plan(stage_bounds).num_stages: stage_bounds}, []
    for number in set(_NUM_STAGES).difference(choices):
        try:
            bounds = profile.balanced_bounds(number)
            interlock.plan(bounds)
            choices[number] = bounds
        except ConfigError:
            left_out.append(number)
    return dict(sorted(choices.items())), sorted(left_out)


class _Views:
    """Turns comparisons into views."""

    def __init__(self, settings: Mapping[str, InterlockConfig]) -> None:
        # The first number of a span by its action without stage and micro-batch, as text ("F", "I@3").
        self.actions: dict[str, int] = {}
        self._settings = settings

    def view(self, comparison: Comparison) -> dict[str, Any]:
        """One position of the sliders."""
        num_micro_batches = comparison.num_micro_batches
        num_batches = 2 if num_micro_batches <= _MOST_FOR_TWO else 1
        excerpts = [self._excerpt(comparison, each, num_batches) for each in comparison.all]
        tick = max(end - start for _, start, end in excerpts) / _TICKS or 1.0
        return {
            "K": comparison.configured.plan.num_stages,
            "M": num_micro_batches,
            "numBatches": num_batches,
            "tick": tick,
            "verdict": verdict(comparison),
            "sources": _sources(comparison),
            "noBetter": comparison.no_better,
            "schedules": {
                each.name: {"speeds": [phase.speed for _, phase in each.phases], **_quality(each)}
                for each in comparison.schedules
            },
            "skipped": dict(text.split(": ", 1) for text in comparison.skipped),
            "forecasts": {
                each.name: {
                    # The table's row, in seconds, bytes and shares.
                    "seconds": each.batch_seconds,
                    "speed": each.speed,
                    **_quality(each),
                    "bubble": each.bubble_fraction,
                    "inFlight": each.in_flight[0],
                    "activationBytes": max(each.activation_bytes),
                    "relayBytes": max(each.relay_bytes),
                    "headShare": each.head_share,
                    "isReference": each.is_reference,
                    "end": round((end - start) / tick),
                    "rows": [self._row(row, start, end, tick) for row in rows],
                }
                for each, (rows, start, end) in zip(comparison.all, excerpts, strict=True)
            },
        }

    def _excerpt(self, comparison: Comparison, each: Forecast, num_batches: int) -> tuple[Rows, float, float]:
        """Spans that cover some batches of the running pipeline, and the times these begin and end.

        At first, stages upstream run ahead of slower ones downstream; where a forecast is too short to get
        past that, more of it is simulated here.
        """
        length = num_batches * each.batch_seconds
        for rows in self._longer(comparison, each):
            start = _steady_start(rows, num_batches, length)
            if min(row[-1].end for row in rows) >= (start + length) * (1 - _SLACK):
                return rows, start, start + length
        # Still ahead: between many stages there is room for many micro-batches.
        end = min(row[-1].end for row in rows)
        return rows, end - length, end

    def _longer(self, comparison: Comparison, each: Forecast) -> Iterator[Rows]:
        """The rows of the forecast, and then ever more batches of them."""
        yield each.spans
        bounds, profile, number = each.plan.stage_bounds, comparison.profile, comparison.num_micro_batches
        interlock = self._settings[each.name]
        setting = interlock, profile.cost_model(bounds, interlock.head), bounds, number
        num_played = 1 + each.spans[0][-1].batch
        while num_played * number < _MOST_PLAYED:
            num_played *= 2
            tied = profile.is_tied_across(bounds)
            yield forecast.play(*setting, tied=tied, num_batches=num_played)[1].spans

    def _row(self, row: Sequence[Span], start: float, end: float, tick: float) -> list[int]:
        """The spans between ``start`` and ``end``; times are rounded once, so that errors do not add up."""
        spans = [span for span in row if span.end > start and span.start < end]
        numbers = [spans[0].batch if spans else 0]
        now = 0
        for span in spans:
            begins, ends = round((span.start - start) / tick), round((span.end - start) / tick)
            text = span.action.kind.value + "".join(str(span.action).partition("@")[1:])
            code = self.actions.setdefault(text, len(self.actions))
            numbers += [code, span.action.micro_batch, begins - now, ends - begins]
            now = ends
        return numbers


def _quality(each: Forecast | ScheduleForecast) -> dict[str, Any]:
    """How well it learns: shares, None where they are not known."""
    return {
        "isMeasured": each.measured is not None,
        "gap": each.gap_recovered,
        "steps": each.relative_steps,
        "toLoss": each.speed_to_loss,
    }


def _sources(comparison: Comparison) -> str:
    """Where the learning of settings was measured, and which were left out for it."""
    texts = [f"Measured in {place}: {'; '.join(names)}." for place, names in comparison.sources.items()]
    if comparison.no_better:
        texts.append(f"Left out, not measured to learn better than local: {'; '.join(comparison.no_better)}.")
    return " ".join(texts)


def _steady_start(rows: Rows, num_batches: int, length: float) -> float:
    """When the first batch starts on stage 0, the last to be held up, from which on batches are steady."""
    running = max(row[0].start for row in rows)
    first: dict[int, float] = {}
    for span in rows[0]:
        first.setdefault(span.batch, span.start)
    starts = list(first.values())
    for start, later in zip(starts[1:], starts[1 + num_batches :], strict=False):
        if start >= running and later - start >= length * (1 - _SLACK):
            return start
    return math.inf
