"""The forecasts as one HTML page: timelines of all settings, with a slider for M and one for K.

Everything is played through here, once for every position of the sliders, and written into the page
as JSON; the page only draws (``page.html``). Times become integers: ticks, of which the longest timeline
of a view has ``_TICKS``.

    view       one position of the sliders: K, M, seconds of a tick, the verdict, the forecasts
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
from ds_interlock.planning.forecast import (
    GLOBAL,
    ZERO_BUBBLE,
    Comparison,
    Forecast,
    compare,
    play,
    setting_name,
    settings_to_compare,
)
from ds_interlock.planning.profile import Profile
from ds_interlock.planning.verdict import verdict
from ds_interlock.schedule.action import Action
from ds_interlock.schedule.render import COLOURS, LABELS, fill_template
from ds_interlock.schedule.simulate import Rows, Span

_NUM_STAGES = (2, 4, 8, 16)
_NUM_MICRO_BATCHES = (1, 2, 4, 8, 16)
_TICKS = 100_000

_MOST_PLAYED = 96
"""Micro-batches after which stages are assumed to run at a steady pace."""

_SLACK = 0.03
"""What a batch may differ from its steady time, as a share of it."""

_MOST_FOR_TWO = 16
"""A batch of more micro-batches than this is drawn once, not twice: the page stays small and readable."""


def render_page(
    interlock: InterlockConfig, profile: Profile, stage_bounds: Sequence[int], num_micro_batches: int
) -> str:
    """The page, as HTML: one file that needs no network.

    Args:
        interlock: The configured setting; its timeline comes first.
        profile: What the layers cost.
        stage_bounds: Where to cut the layers into the number of stages at which the slider for K is at
            first. For the others they are cut as evenly as can be.
        num_micro_batches: Where the slider for M is at first.

    Raises:
        ConfigError: If the configured setting, the stages and the profile do not fit together.
    """
    stages, left_out = _stage_choices(interlock, profile, stage_bounds)
    micro_batches = sorted({*_NUM_MICRO_BATCHES, num_micro_batches})
    settings = {setting_name(setting): setting for setting in (interlock, *settings_to_compare(interlock))}
    maker = _Views(settings)
    positions = [*itertools.product(stages.values(), micro_batches)]
    views = [
        maker.view(compare(interlock, profile, bounds, m))
        for bounds, m in tqdm(positions, "positions of the sliders", leave=False, disable=None)
    ]
    names = dict.fromkeys([setting_name(interlock), GLOBAL, ZERO_BUBBLE, *settings])
    data = {
        "isUnit": profile.is_unit,
        "profile": profile.model_dump(mode="json", exclude={"layers", "head", "versions"}),
        "numLayers": len(profile.layers),
        "K": list(stages),
        "leftOut": left_out,
        "M": micro_batches,
        "configured": {"K": len(stage_bounds) - 1, "M": num_micro_batches, "name": setting_name(interlock)},
        "names": [name for name in names if any(name in view["forecasts"] for view in views)],
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
    """Turns comparisons into views.

    Attributes:
        actions: The first number of a span by what it refers to: actions without stage and micro-batch,
            in their text form ("F", "I@3").
    """

    def __init__(self, settings: Mapping[str, InterlockConfig]) -> None:
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
            "skipped": dict(text.split(": ", 1) for text in comparison.skipped),
            "forecasts": {
                each.name: {
                    # The table's row, in seconds, bytes and shares.
                    "seconds": each.batch_seconds,
                    "speed": each.speed,
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

    def _excerpt(
        self, comparison: Comparison, forecast: Forecast, num_batches: int
    ) -> tuple[Rows, float, float]:
        """Spans that cover some batches of the running pipeline, and the times these begin and end.

        At first, stages upstream run ahead of slower ones downstream; where a forecast is too short to get
        past that, more of it is simulated here.
        """
        length = num_batches * forecast.batch_seconds
        for rows in self._longer(comparison, forecast):
            start = _steady_start(rows, num_batches, length)
            if min(row[-1].end for row in rows) >= (start + length) * (1 - _SLACK):
                return rows, start, start + length
        # Still ahead: between many stages there is room for many micro-batches.
        end = min(row[-1].end for row in rows)
        return rows, end - length, end

    def _longer(self, comparison: Comparison, forecast: Forecast) -> Iterator[Rows]:
        """The rows of the forecast, and then ever more batches of them."""
        yield forecast.spans
        setting, num_micro_batches = self._settings[forecast.name], comparison.num_micro_batches
        bounds, profile = forecast.plan.stage_bounds, comparison.profile
        costs, tied = profile.cost_model(bounds), profile.is_tied_across(bounds)
        num_played = 1 + forecast.spans[0][-1].batch
        while num_played * num_micro_batches < _MOST_PLAYED:
            num_played *= 2
            _, longer = play(setting, costs, bounds, num_micro_batches, tied=tied, num_batches=num_played)
            yield longer.spans

    def _row(self, row: Sequence[Span], start: float, end: float, tick: float) -> list[int]:
        """The spans between ``start`` and ``end``; times are rounded once, so that errors do not add up."""
        spans = [span for span in row if span.end > start and span.start < end]
        numbers = [spans[0].batch if spans else 0]
        now = 0
        for span in spans:
            begins, ends = round((span.start - start) / tick), round((span.end - start) / tick)
            numbers += [self._code(span.action), span.action.micro_batch, begins - now, ends - begins]
            now = ends
        return numbers

    def _code(self, action: Action) -> int:
        text = action.kind.value + "".join(str(action).partition("@")[1:])
        return self.actions.setdefault(text, len(self.actions))


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
