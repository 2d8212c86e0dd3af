"""Pictures of a program: a grid of text, and an SVG of when what ran.

The grid shows the order of work. One row a stage, time to the right, every action one slot wide
whatever it costs, and a blank where the stage waits. Window 2, two micro-batches:

    stage 0 | F0 F1       W0       W1 S2
    stage 1 |    F0 H0 I0 F1 H1 I1 W0 W1 S2
    stage 2 |       F0 H0 I0 F1 H1 I1 W0    W1 S2
    stage 3 |          F0 H0 I0 W0 F1 H1 I1 W1 S2

The stage's number stands in front of its row; the losses of an action are left out where the stage
has no choice. The SVG shows durations, measured or simulated, and any number of timelines under one
another, on one scale where they have one unit.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

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
    """The work of ``program`` as a grid of text, one row a stage, time to the right.

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

# Classes of the style sheet: f, h, i, w, b, s.
_LOOKS = {kind: kind.value.lower() for kind in LABELS}

_STYLE = """
  .ground { fill: #ffffff } .ink { fill: #1f2430 } .soft { fill: #5b6472 }
  .line { stroke: #c9ced6; stroke-width: 1 }
  .idle { fill: #eceff3 } .hatch { stroke: #d3d8e0; stroke-width: 2 }
  .f { fill: #5b9bd5 } .h { fill: #e6a532 } .i { fill: #3fae8c } .w { fill: #a98bd0 } .b { fill: #cb6a94 }
  .s { fill: #8d95a1 } .odd { opacity: 0.72 } .in { fill: #10131a }
  text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px }
  .title { font-size: 17px; font-weight: 600 } .name { font-size: 13px; font-weight: 600 }
  .in { font-size: 11px; text-anchor: middle } .mid { text-anchor: middle } .end { text-anchor: end }
  rect.f, rect.h, rect.i, rect.w, rect.b, rect.s { stroke: #ffffff; stroke-width: 0.6 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #14171d } .ink { fill: #e8ebf0 } .soft { fill: #9aa3b2 }
    .line { stroke: #39404c } .idle { fill: #20252e } .hatch { stroke: #2f3642 }
    rect.f, rect.h, rect.i, rect.w, rect.b, rect.s { stroke: #14171d }
  }
"""


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
    body: list[str] = []
    top = _TOP
    for timeline in timelines:
        body += _timeline_svg(timeline, extents[timeline.unit], top)
        top += _ROW * len(timeline.rows) + _GAP
    kinds = {span.action.kind for timeline in timelines for row in timeline.rows for span in row}
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" '
        f'viewBox="0 0 {_WIDTH} {top}" role="img">',
        f"<title>{_xml(title)}</title>",
        f"<style>{_STYLE}</style>",
        '<defs><pattern id="waiting" width="7" height="7" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="idle" width="7" height="7"/>'
        '<line class="hatch" x1="0" y1="0" x2="0" y2="7"/></pattern></defs>',
        f'<rect class="ground" width="{_WIDTH}" height="{top}"/>',
        f'<text class="title ink" x="{_RIGHT}" y="30">{_xml(title)}</text>',
        *_legend_svg(kinds),
    ]
    return "\n".join([*head, *body, "</svg>", ""])


def _extent(timeline: Timeline) -> float:
    spans = [span for row in timeline.rows for span in row]
    return max(span.end for span in spans) - min(span.start for span in spans)


def _legend_svg(kinds: Collection[Kind]) -> Iterator[str]:
    """The colours of those kinds of action that occur, and what waiting looks like."""
    x = float(_RIGHT)
    entries = [(f'class="{_LOOKS[kind]}"', label) for kind, label in LABELS.items() if kind in kinds]
    for paint, label in [*entries, ('fill="url(#waiting)"', "waiting")]:
        yield f'<g class="legend"><rect {paint} x="{x:.1f}" y="43" width="14" height="14" rx="3"/>'
        yield f'<text class="soft" x="{x + 20:.1f}" y="54">{label}</text></g>'
        x += 20 + _GLYPH * len(label) + 18


def _timeline_svg(timeline: Timeline, extent: float, top: float) -> Iterator[str]:
    origin = min(span.start for row in timeline.rows for span in row)
    scale = (_WIDTH - _LEFT - _RIGHT) / extent if extent > 0 else 0.0

    def x_of(time: float) -> float:
        return _LEFT + (time - origin) * scale

    yield f'<text class="name ink" x="{_RIGHT}" y="{top - 8}">{_xml(timeline.name)}</text>'
    end = origin + _extent(timeline)
    for stage, spans in enumerate(timeline.rows):
        y = top + stage * _ROW
        yield f'<text class="soft end" x="{_LEFT - 10}" y="{y + 16}">stage {stage}</text>'
        for start, stop in waits(spans, origin, end):
            left, width = x_of(start), x_of(stop) - x_of(start)
            if width >= _NARROWEST_GAP:
                area = f'x="{left:.2f}" y="{y}" width="{width:.2f}" height="{_BOX}"'
                yield f'<rect class="waiting" fill="url(#waiting)" {area}/>'
        for span in spans:
            yield _span_svg(span, timeline.unit, origin, x_of, y)
    yield from _axis_svg(timeline.unit, extent, top + _ROW * len(timeline.rows))


def waits(spans: Sequence[Span], start: float, end: float) -> Iterator[tuple[float, float]]:
    """The times between ``start`` and ``end`` that no span covers: when a stage waits."""
    for span in sorted(spans, key=lambda span: span.start):
        if span.start > start:
            yield start, span.start
        start = max(start, span.end)
    if end > start:
        yield start, end


def _span_svg(span: Span, unit: str, origin: float, x_of: Callable[[float], float], y: float) -> str:
    look = _LOOKS[span.action.kind]
    shade = f"{look} odd" if span.batch % 2 else look
    left, width = x_of(span.start), x_of(span.end) - x_of(span.start)
    factor, shown_unit = _shown_unit(unit, span.end - span.start)
    text = (
        f"{span.action}, batch {span.batch}: {(span.end - span.start) * factor:.4g} {shown_unit}, "
        f"from {span.start - origin:.4g} to {span.end - origin:.4g} {unit}"
    )
    box = f'<rect class="{shade}" x="{left:.2f}" y="{y}" width="{width:.2f}" height="{_BOX}" rx="2"/>'
    label = "" if span.action.kind is Kind.STEP else str(span.action.micro_batch)
    inside = ""
    if label and width >= _GLYPH * len(label) + 4:
        inside = f'<text class="in" x="{left + width / 2:.2f}" y="{y + 15}">{label}</text>'
    return f'<g class="span"><title>{_xml(text)}</title>{box}{inside}</g>'


def _axis_svg(unit: str, extent: float, y: float) -> Iterator[str]:
    """The time axis: round numbers, at most ``_MOST_TICKS`` + 1 of them."""
    factor, shown_unit = _shown_unit(unit, extent)
    length = _WIDTH - _LEFT - _RIGHT
    yield f'<line class="line" x1="{_LEFT}" y1="{y}" x2="{_LEFT + length}" y2="{y}"/>'
    yield f'<text class="soft end" x="{_LEFT - 10}" y="{y + 18}">{_xml(shown_unit)}</text>'
    step = _tick_step(extent * factor)
    num_ticks = math.floor(extent * factor / step + 1e-9) + 1 if step else 1
    for number in range(num_ticks):
        x = _LEFT + (number * step / (extent * factor) * length if step else 0.0)
        yield f'<line class="line" x1="{x:.2f}" y1="{y}" x2="{x:.2f}" y2="{y + 5}"/>'
        yield f'<text class="soft mid" x="{x:.2f}" y="{y + 18}">{number * step:g}</text>'


def _tick_step(extent: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts ``extent`` into few enough pieces."""
    if extent <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(extent / _MOST_TICKS))
    return next(factor * power for factor in (1, 2, 5, 10) if extent / (factor * power) <= _MOST_TICKS)


def _shown_unit(unit: str, extent: float) -> tuple[float, str]:
    """What to multiply by, and the unit to write: short times in seconds read better in ms."""
    return (1000.0, "ms") if unit == "s" and extent < 1.0 else (1.0, unit)


def _xml(text: str) -> str:
    """``text`` as XML content; characters that XML cannot hold become spaces."""
    return escape("".join(char if char.isprintable() else " " for char in text))
