"""Pictures of a program: a grid of text, and an SVG of when what ran.

The grid shows the order of work. One row per stage, time to the right, every action one slot wide
whatever it costs, and a blank where the stage waits. Window 2, two micro-batches:

    stage 0 | F0 F1       W0       W1 S2
    stage 1 |    F0 H0 I0 F1 H1 I1 W0 W1 S2
    stage 2 |       F0 H0 I0 F1 H1 I1 W0    W1 S2
    stage 3 |          F0 H0 I0 W0 F1 H1 I1 W1 S2

The stage's number comes before its row; the losses of an action are left out where the stage
has no choice. The SVG shows durations, measured or simulated, and any number of timelines under one
another, on one scale where they have one unit.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import COMPUTE_KINDS, Action, Kind
from ds_interlock.schedule.dependency import dependencies, stage_actions
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.simulate import Span

Place = tuple[int, int]
"""A place in a program: the stage in whose list it is, and the position in the list."""

_CONTEXT_COLUMNS = 6
"""Columns shown on either side of a faulty action when a grid is too wide to show whole."""

_WHOLE_COLUMNS = 40
"""The widest grid that is shown whole even if something in it is faulty."""


@dataclass(frozen=True)
class Timeline:
    """When the stages did what, for ``render_svg``.

    Attributes:
        name: What to call it, for example "measured".
        unit: Unit of the spans' times: "s", or for example "forwards".
        rows: For each stage its spans.
    """

    name: str
    unit: str
    rows: tuple[tuple[Span, ...], ...]


# The grid.


def render_text(program: Program, *, faulty: Collection[Place] = (), missing: Collection[Action] = ()) -> str:
    """The work of ``program`` as a grid of text, one row per stage, time to the right.

    Args:
        program: What to show. It need not be correct.
        faulty: Places to mark, like ``>2F0<``; communication is shown only where it is marked. A
            wide grid is cut down to their surroundings.
        missing: Actions to show as absent, like ``>2F0?<``, at the end of their stage's row.

    Returns:
        The lines, without a newline at the end.
    """
    columns = _columns(program, faulty)
    cells = {
        (stage, column): _cell(program, (stage, position), faulty)
        for (stage, position), column in columns.items()
    }
    end = max(columns.values(), default=-1) + 1
    for stage in range(len(program.stages)):
        absent = " ".join(f">{action}?<" for action in sorted(missing) if action.stage == stage)
        if absent:
            cells[stage, end] = absent
    shown = _shown_columns(end + bool(missing), [columns[place] for place in faulty], bool(missing))
    widths = [max((len(cells.get((s, c), "")) for s in range(len(program.stages))), default=0) for c in shown]
    lines = []
    for stage in range(len(program.stages)):
        row = []
        for before, column, width in zip([-1, *shown], shown, widths, strict=False):
            if column > before + 1:
                row.append("...")
            row.append(cells.get((stage, column), "").ljust(width))
        lines.append(f"stage {stage} | {' '.join(row)}".rstrip())
    return "\n".join(lines)


def _shown_columns(num_columns: int, faulty: Sequence[int], missing: bool) -> list[int]:
    """All columns or, of a wide grid with faults in it, those around the faults."""
    around = [*faulty, num_columns - 1] if missing else faulty
    if not around or num_columns <= _WHOLE_COLUMNS:
        return list(range(num_columns))
    return [
        column
        for column in range(num_columns)
        if any(abs(column - centre) <= _CONTEXT_COLUMNS for centre in around)
    ]


def _cell(program: Program, place: Place, faulty: Collection[Place]) -> str:
    """An action as it stands in the grid; in full if something is wrong with it."""
    stage, position = place
    action = program.stages[stage][position]
    if place in faulty:
        return f">{action}<"
    if action.stage != stage:
        return str(action)
    actions = stage_actions(program.plan, stage, action.micro_batch)
    same_kind = [other for other in actions if other.kind is action.kind]
    losses = () if same_kind == [action] else action.losses
    return str(Action(stage, action.kind, action.micro_batch, losses)).removeprefix(str(stage))


def _columns(program: Program, faulty: Collection[Place]) -> dict[Place, int]:
    """The column of every action to show: the first that is free once what it needs is done.

    Where the stages of a faulty program wait for each other, the first of them goes on regardless.
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
        ready = [place for place in heads if needs[place] <= done.keys()] or heads[:1]
        for place in ready:
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
_BOX = 22
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
}
"""What pictures call the work."""

COLOURS = {"f": "#5b9bd5", "h": "#e6a532", "i": "#3fae8c", "w": "#a98bd0", "b": "#cb6a94", "s": "#8d95a1"}
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
    extents: dict[str, float] = {}
    for timeline in timelines:
        if not any(timeline.rows):
            raise ScheduleError(f"timeline {timeline.name!r} has no spans: there is nothing to draw")
        extents[timeline.unit] = max(extents.get(timeline.unit, 0.0), _extent(timeline))
    charts = []
    top = _TOP
    for timeline in timelines:
        charts.append(_chart(timeline, extents[timeline.unit], top))
        top += _ROW * len(timeline.rows) + _GAP
    kinds = {span.action.kind for timeline in timelines for row in timeline.rows for span in row}
    return fill_template(
        __package__,
        "timelines.svg",
        title=_printable(title),
        colours=COLOURS,
        legend=list(_legend(kinds)),
        charts=charts,
        width=_WIDTH,
        height=top,
        left=_LEFT,
        right=_RIGHT,
        box=_BOX,
    )


def fill_template(package: str, name: str, **values: Any) -> str:
    """The Jinja template ``name`` of ``package``, filled; values are escaped as XML."""
    template = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    rules = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    return rules.from_string(template).render(values)


def _extent(timeline: Timeline) -> float:
    spans = [span for row in timeline.rows for span in row]
    return max(span.end for span in spans) - min(span.start for span in spans)


def _legend(kinds: Collection[Kind]) -> Iterator[dict[str, str]]:
    """The kinds of action that occur, and what waiting looks like."""
    x = float(_RIGHT)
    for kind, label in [*LABELS.items(), (None, "waiting")]:
        if kind is None or kind in kinds:
            look = kind.value.lower() if kind else ""
            yield {"kind": look, "label": label, "x": f"{x:.1f}", "text_x": f"{x + 20:.1f}"}
            x += 20 + _GLYPH * len(label) + 18


def _chart(timeline: Timeline, extent: float, top: int) -> dict[str, Any]:
    """What the template needs of one timeline. ``extent`` is that of the longest with its unit."""
    origin = min(span.start for row in timeline.rows for span in row)
    end = origin + _extent(timeline)
    scale = (_WIDTH - _LEFT - _RIGHT) / extent if extent > 0 else 0.0

    def area(start: float, stop: float) -> tuple[float, float]:
        left = _LEFT + (start - origin) * scale
        return left, _LEFT + (stop - origin) * scale - left

    def gaps(spans: Sequence[Span]) -> Iterator[dict[str, str]]:
        for start, stop in waits(spans, origin, end):
            left, width = area(start, stop)
            if width >= _NARROWEST_GAP:
                yield {"x": f"{left:.2f}", "width": f"{width:.2f}"}

    def box(span: Span) -> dict[str, str]:
        left, width = area(span.start, span.end)
        seconds = span.end - span.start
        factor, unit = _shown_unit(timeline.unit, seconds)
        times = f"{span.start - origin:.4g} to {span.end - origin:.4g} {timeline.unit}"
        label = "" if span.action.kind is Kind.STEP else str(span.action.micro_batch)
        return {
            "text": _printable(
                f"{span.action}, batch {span.batch}: {seconds * factor:.4g} {unit}, from {times}"
            ),
            "look": span.action.kind.value.lower() + " odd" * (span.batch % 2),
            "x": f"{left:.2f}",
            "width": f"{width:.2f}",
            "middle": f"{left + width / 2:.2f}",
            "label": label if width >= _GLYPH * len(label) + 4 else "",
        }

    rows = [
        {"y": top + stage * _ROW, "waits": gaps(spans), "spans": map(box, spans)}
        for stage, spans in enumerate(timeline.rows)
    ]
    unit, ticks = _ticks(timeline.unit, extent)
    name = _printable(timeline.name)
    return {
        "top": top,
        "end": top + _ROW * len(rows),
        "name": name,
        "rows": rows,
        "unit": unit,
        "ticks": ticks,
    }


def waits(spans: Sequence[Span], start: float, end: float) -> Iterator[tuple[float, float]]:
    """The times between ``start`` and ``end`` that no span covers: when a stage waits."""
    for span in sorted(spans, key=lambda span: span.start):
        if span.start > start:
            yield start, span.start
        start = max(start, span.end)
    if end > start:
        yield start, end


def _ticks(unit: str, extent: float) -> tuple[str, list[tuple[str, str]]]:
    """The unit and the ticks of the time axis: round numbers, at most ``_MOST_TICKS`` + 1 of them."""
    factor, shown_unit = _shown_unit(unit, extent)
    step = _tick_step(extent * factor)
    num_ticks = math.floor(extent * factor / step + 1e-9) + 1 if step else 1
    length = _WIDTH - _LEFT - _RIGHT
    places = [_LEFT + (n * step / (extent * factor) * length if step else 0.0) for n in range(num_ticks)]
    return _printable(shown_unit), [(f"{x:.2f}", f"{n * step:g}") for n, x in enumerate(places)]


def _tick_step(extent: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts ``extent`` into few enough pieces."""
    if extent <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(extent / _MOST_TICKS))
    return next(factor * power for factor in (1, 2, 5, 10) if extent / (factor * power) <= _MOST_TICKS)


def _shown_unit(unit: str, extent: float) -> tuple[float, str]:
    """What to multiply by, and the unit to write: short times in seconds read better in ms."""
    return (1000.0, "ms") if unit == "s" and extent < 1.0 else (1.0, unit)


def _printable(text: str) -> str:
    """``text`` with spaces for characters that XML cannot hold."""
    return "".join(char if char.isprintable() else " " for char in text)
