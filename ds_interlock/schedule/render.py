"""Pictures of a program: a grid of text, and an SVG of when what ran.

The grid shows the order of work. One row per stage, time to the right, every action one slot wide
whatever it costs, and a blank where the stage waits. Window 2, two micro-batches:

    stage 0 | F0 F1       W0       W1 S2
    stage 1 |    F0 H0 I0 F1 H1 I1 W0 W1 S2
    stage 2 |       F0 H0 I0 F1 H1 I1 W0    W1 S2
    stage 3 |          F0 H0 I0 W0 F1 H1 I1 W1 S2

The losses of an action are left out where the stage has no choice. The SVG shows durations, measured or
simulated, of any number of timelines.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import COMPUTE_KINDS, Action, Kind
from ds_interlock.schedule.dependency import dependencies, stage_actions
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.simulate import Rows, Span, from_zero
from ds_interlock.schedule.standstill import Place


@dataclass(frozen=True)
class Timeline:
    """When the stages did what."""

    name: str
    unit: str  # of the spans' times: "s", or for example "forwards"
    rows: Rows


# The grid.


def render_text(program: Program, *, faulty: Collection[Place] = (), missing: Collection[Action] = ()) -> str:
    """The work of ``program`` as a grid of text, one row per stage, time to the right.

    Args:
        program: What to show. It need not be correct.
        faulty: Places to mark, like ``>2F0<``; communication is shown only where it is marked.
        missing: Actions to show as absent, like ``>2F0?<``, at the end of their stage's row.

    Returns:
        The lines, without a newline at the end.
    """
    rows: list[dict[int, str]] = [{} for _ in program.stages]
    for (stage, position), column in _columns(program, faulty).items():
        rows[stage][column] = _cell(program, (stage, position), faulty)
    end = max((column + 1 for row in rows for column in row), default=0)
    widths = [max(len(row.get(column, "")) for row in rows) for column in range(end)]
    lines = []
    for stage, row in enumerate(rows):
        cells = [row.get(column, "").ljust(width) for column, width in enumerate(widths)]
        cells += [f">{action}?<" for action in sorted(missing) if action.stage == stage]
        lines.append(f"stage {stage} | {' '.join(cells)}".rstrip())
    return "\n".join(lines)


def _cell(program: Program, place: Place, faulty: Collection[Place]) -> str:
    """An action as it stands in the grid; in full if something is wrong with it."""
    stage, position = place
    action = program.stages[stage][position]
    if place in faulty:
        return f">{action}<"
    if action.stage != stage:
        return str(action)
    actions = stage_actions(program.plan, stage, action.micro_batch)
    alone = [other for other in actions if other.kind is action.kind] == [action]
    return str(replace(action, losses=()) if alone else action).removeprefix(str(stage))


def _columns(program: Program, faulty: Collection[Place]) -> dict[Place, int]:
    """The column of every action to show: the first that is free once what it needs is done.

    Where the stages of a faulty program wait for each other, the first of them is drawn regardless.
    """
    columns: dict[Place, int] = {}
    done: dict[Action, int] = {}
    queues = [
        [
            (stage, position)
            for position, action in enumerate(actions)
            if action.kind in COMPUTE_KINDS or (stage, position) in faulty
        ]
        for stage, actions in enumerate(program.stages)
    ]
    present = {action for actions in program.stages for action in actions}
    free = [0] * len(queues)
    while any(queues):
        heads = [queue[0] for queue in queues if queue]
        needs = {place: _elsewhere(program, place) & present for place in heads}
        place = next((each for each in heads if needs[each] <= done.keys()), heads[0])
        stage, position = place
        column = max([free[stage], *(done[need] + 1 for need in needs[place] & done.keys())])
        columns[place] = column
        done.setdefault(program.stages[stage][position], column)
        free[stage] = column + 1
        queues[stage].pop(0)
    return columns


def _elsewhere(program: Program, place: Place) -> set[Action]:
    """What the action needs from other stages; nothing if the plan does not know the action."""
    action = program.stages[place[0]][place[1]]
    if action.kind not in COMPUTE_KINDS or action.kind is Kind.STEP:
        return set()
    try:
        needs = dependencies(program.plan, action)
    except ScheduleError:
        return set()
    return {needed for needed in needs if needed.stage != action.stage}


# The SVG. All lengths are pixels.

_WIDTH = 1000
_LEFT = 72
_RIGHT = 24
_ROW = 26
_GAP = 64
_TOP = 84
_GLYPH = 6.5
_NARROWEST_GAP = 0.5
_MOST_TICKS = 10

LABELS = {
    Kind.FORWARD: "forward",
    Kind.HEAD: "head",
    Kind.INPUT_GRADIENT: "relay (input gradient)",
    Kind.WEIGHT_GRADIENT: "weight gradient",
    Kind.BACKWARD: "backward, both gradients",
    Kind.STEP: "optimizer step",
    Kind.LOAD: "waiting for data",
}
"""What pictures call the work, and reading data, for which all other work of a stage waits."""

COLOURS = {
    **{"f": "#5b9bd5", "h": "#e6a532", "i": "#3fae8c", "w": "#a98bd0", "b": "#cb6a94", "s": "#8d95a1"},
    "load": "#b0793f",
}
"""What pictures paint it with, by the kind's value in lower case, the name of its class in style sheets."""


def render_svg(timelines: Sequence[Timeline], title: str = "Pipeline timeline") -> str:
    """A self-contained SVG of ``timelines``, one above the other.

    A row is a stage, a box an action, with its micro-batch's number where there is room and a
    tooltip that says what it is and how long it took; hatching is a stage that waits. Every other
    batch is paler. A timeline starts where its first span does. Those of one unit share a scale.

    Args:
        timelines: What to draw, from the top.
        title: Heading of the picture.

    Raises:
        ScheduleError: If there is no timeline, or one has no spans.
    """
    if not timelines:
        raise ScheduleError("there is no timeline to draw: give at least one")
    lengths: dict[str, float] = {}
    for timeline in timelines:
        if not any(timeline.rows):
            raise ScheduleError(f"timeline {timeline.name!r} has no spans: there is nothing to draw")
        length = last_end(from_zero(timeline.rows))
        lengths[timeline.unit] = max(lengths.get(timeline.unit, 0.0), length)
    charts = []
    top = _TOP
    for timeline in timelines:
        charts.append(_chart(timeline, lengths[timeline.unit], top))
        top += _ROW * len(timeline.rows) + _GAP
    kinds = {span.action.kind for timeline in timelines for row in timeline.rows for span in row}
    return fill_template(
        __package__,
        "timelines.svg",
        title=title,
        colours=COLOURS,
        legend=list(_legend(kinds)),
        charts=charts,
        width=_WIDTH,
        height=top,
        left=_LEFT,
        right=_RIGHT,
        row=_ROW,
    )


def fill_template(package: str, name: str, **values: Any) -> str:
    """The Jinja template ``name`` of ``package``, filled; values are escaped as XML."""
    template = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    rules = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined, finalize=_printable)
    return rules.from_string(template).render(values)


def _printable(value: Any) -> Any:
    """A text with spaces for characters that XML cannot hold; any other value as it is."""
    return "".join(char if char.isprintable() else " " for char in value) if type(value) is str else value


def _legend(kinds: Collection[Kind]) -> Iterator[tuple[str, str, float]]:
    """Class, label and position of the kinds of action that occur, and of waiting."""
    x = float(_RIGHT)
    for kind, label in [*LABELS.items(), (None, "waiting")]:
        if kind is None or kind in kinds:
            yield kind.value.lower() if kind else "", label, x
            x += 20 + _GLYPH * len(label) + 18


def _chart(timeline: Timeline, length: float, top: int) -> dict[str, Any]:
    """What the template needs of one timeline. ``length`` is that of the longest with its unit."""
    rows = from_zero(timeline.rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / length if length > 0 else 0.0

    def area(start: float, stop: float) -> tuple[float, float]:
        left = _LEFT + start * scale
        return left, _LEFT + stop * scale - left

    def box(span: Span) -> dict[str, Any]:
        left, width = area(span.start, span.end)
        seconds = span.end - span.start
        factor, unit = _readable_unit(timeline.unit, seconds)
        times = f"{span.start:.4g} to {span.end:.4g} {timeline.unit}"
        label = "" if span.action.kind is Kind.STEP else str(span.action.micro_batch)
        return {
            "text": f"{span.action}, batch {span.batch}: {seconds * factor:.4g} {unit}, from {times}",
            "look": span.action.kind.value.lower() + " odd" * (span.batch % 2),
            "x": left,
            "width": width,
            "label": label if width >= _GLYPH * len(label) + 4 else "",
        }

    gaps = [[area(*wait) for wait in waits(spans, last_end(rows))] for spans in rows]
    unit, ticks = _ticks(timeline.unit, length)
    return {
        "top": top,
        "name": timeline.name,
        "rows": [
            {"waits": [gap for gap in gaps_of if gap[1] >= _NARROWEST_GAP], "spans": map(box, spans)}
            for gaps_of, spans in zip(gaps, rows, strict=True)
        ],
        "unit": unit,
        "ticks": ticks,
    }


def last_end(rows: Rows) -> float:
    """When the last span ends; 0 without any."""
    return max((span.end for row in rows for span in row), default=0.0)


def waits(spans: Sequence[Span], end: float) -> Iterator[tuple[float, float]]:
    """The times from 0 to ``end`` that no span covers: when a stage waits."""
    now = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        if span.start > now:
            yield now, span.start
        now = max(now, span.end)
    if end > now:
        yield now, end


def _ticks(unit: str, length: float) -> tuple[str, list[tuple[float, float]]]:
    """The unit and the ticks (position, number) of the time axis: at most ``_MOST_TICKS`` + 1."""
    factor, readable = _readable_unit(unit, length)
    whole = length * factor
    if whole <= 0:
        return readable, [(_LEFT, 0.0)]
    power = 10.0 ** math.floor(math.log10(whole / _MOST_TICKS))
    step = next(digit * power for digit in (1, 2, 5, 10) if whole / (digit * power) <= _MOST_TICKS)
    numbers = [n * step for n in range(math.floor(whole / step + 1e-9) + 1)]
    return readable, [(_LEFT + number / whole * (_WIDTH - _LEFT - _RIGHT), number) for number in numbers]


def _readable_unit(unit: str, time: float) -> tuple[float, str]:
    """What to multiply by, and the unit to write: short times in seconds read better in ms."""
    return (1000.0, "ms") if unit == "s" and time < 1.0 else (1.0, unit)
