"""The grid of text and the SVG."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from schedule_strategies import bounds_of, grid

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule import (
    CostModel,
    GradientFlowPlan,
    Timeline,
    evaluation_program,
    render_svg,
    simulate,
    training_program,
)
from ds_interlock.schedule.action import Action
from ds_interlock.schedule.render import render_text
from ds_interlock.schedule.simulate import Span

SVG = "{http://www.w3.org/2000/svg}"


# The grid. More of them are in test_order.py and test_verify.py.


def test_losses_are_written_where_a_stage_has_a_choice():
    # Stage 1 of window 3 relays loss 0 alone; stage 2 relays losses 0 and 1 apart.
    assert render_text(training_program(GradientFlowPlan.n_wise(4, 3), 1)) == grid("""
        stage 0 | F0                  W0   S1
        stage 1 |    F0            I0      W0 S1
        stage 2 |       F0 H0 I0@0    I0@1 W0 S1
        stage 3 |          F0 H0   I0 W0   S1
    """)


def test_evaluation():
    plan = GradientFlowPlan.n_wise(window=1.5, stage_bounds=bounds_of(2, 4))
    assert render_text(evaluation_program(plan, 2, all_heads=True)) == grid("""
        stage 0 | F0 F1
        stage 1 |    F0@0 F0 H0@0 H0@1 F1@0 F1 H1@0 H1@1
    """)


def test_marks_show_communication_too_and_print_in_full():
    program = training_program(GradientFlowPlan.local(2), 1)
    send = program.stages[0].index(Action.parse("0SEND_F0"))
    text = render_text(program, faulty={(0, send)}, missing=[Action.parse("1B3")])
    assert text == grid("""
        stage 0 | F0 >0SEND_F0< H0 W0 S1
        stage 1 |    F0         H0 W0 S1 >1B3?<
    """)


# The SVG.


def _simulated(name="simulated", unit="forwards", plan=None, **arguments):
    program = training_program(plan or GradientFlowPlan.n_wise(4, 2), 3)
    return Timeline(name, unit, simulate(program, **arguments).spans)


def _parse(text):
    return ElementTree.fromstring(text)


def _boxes(svg):
    """Of every span its tooltip, its box and its number."""
    groups = [group for group in svg.iter(f"{SVG}g") if group.get("class") == "span"]
    return [
        (g.findtext(f"{SVG}title"), g.find(f"{SVG}rect").attrib, g.findtext(f"{SVG}text")) for g in groups
    ]


def test_one_box_for_every_span_of_every_timeline():
    timelines = [_simulated("measured", num_batches=2), _simulated(num_batches=1)]
    svg = _parse(render_svg(timelines, "two"))
    assert svg.tag == f"{SVG}svg"
    spans = [span for timeline in timelines for row in timeline.rows for span in row]
    boxes = _boxes(svg)
    assert len(boxes) == len(spans) > 50
    assert [title.split(",")[0] for title, _, _ in boxes] == [str(span.action) for span in spans]


def test_boxes_lie_where_their_times_are():
    rows = (
        (Span(Action.parse("0F0"), 0, 10.0, 12.0), Span(Action.parse("0W0"), 1, 16.0, 20.0)),
        (Span(Action.parse("1F7"), 0, 12.0, 12.01),),
    )
    svg = _parse(render_svg([Timeline("a", "steps", rows)]))
    (first, one, number), (second, two, _), (third, three, no_room) = _boxes(svg)
    assert first == "0F0, batch 0: 2 steps, from 0 to 2 steps"
    assert second == "0W0, batch 1: 4 steps, from 6 to 10 steps"
    assert third == "1F7, batch 0: 0.01 steps, from 2 to 2.01 steps"
    unit = float(one["width"]) / 2
    assert float(two["width"]) == pytest.approx(4 * unit, abs=0.02)
    assert float(two["x"]) - float(one["x"]) == pytest.approx(6 * unit, abs=0.02)
    assert float(three["x"]) - float(one["x"]) == pytest.approx(2 * unit, abs=0.02)
    assert float(three["y"]) > float(one["y"]) == float(two["y"])
    assert (number, no_room) == ("0", None)
    assert one["class"] == "f"
    assert two["class"] == "w odd"
    waiting = [rect.attrib for rect in svg.iter(f"{SVG}rect") if rect.get("class") == "waiting"]
    widths = [float(rect["width"]) / unit for rect in waiting]
    assert widths == pytest.approx([4, 2, 7.99], abs=0.01)


def test_timelines_of_one_unit_share_a_scale_and_others_do_not():
    short = Timeline("short", "s", ((Span(Action.parse("0F0"), 0, 0.0, 1.0),),))
    long = Timeline("long", "s", ((Span(Action.parse("0F0"), 0, 5.0, 9.0),),))
    other = Timeline("other", "forwards", ((Span(Action.parse("0F0"), 0, 0.0, 70.0),),))
    widths = [float(box["width"]) for _, box, _ in _boxes(_parse(render_svg([short, long, other])))]
    assert widths[1] == pytest.approx(4 * widths[0], abs=0.05)
    assert widths[2] == widths[1]


def test_the_axis_has_round_numbers_and_a_unit():
    def texts(length, unit):
        timeline = Timeline("t", unit, ((Span(Action.parse("0S4"), 0, 0.0, length),),))
        return [text.text for text in _parse(render_svg([timeline])).iter(f"{SVG}text")]

    assert texts(17.2, "forwards")[-10:] == ["forwards", "0", "2", "4", "6", "8", "10", "12", "14", "16"]
    assert texts(0.043, "s")[-10:] == ["ms", "0", "5", "10", "15", "20", "25", "30", "35", "40"]
    assert texts(3.0, "s")[-8:] == ["s", "0", "0.5", "1", "1.5", "2", "2.5", "3"]


def test_names_are_escaped():
    name = """<b>&"'\x00\x1b]]>"""
    text = render_svg([_simulated(name, "<&s>")], title=name)
    svg = _parse(text)
    texts = [element.text for element in svg.iter(f"{SVG}text")]
    assert texts.count("""<b>&"'  ]]>""") == 2
    assert "<&s>" in texts
    assert svg.findtext(f"{SVG}title") == """<b>&"'  ]]>"""


def test_the_legend_names_the_kinds_that_occur():
    def legend(plan):
        groups = _parse(render_svg([_simulated(plan=plan)])).iter(f"{SVG}g")
        return [g.findtext(f"{SVG}text") for g in groups if g.get("class") == "legend"]

    shared = ["optimizer step", "waiting"]
    assert legend(GradientFlowPlan.local(3)) == ["forward", "head", "weight gradient", *shared]
    assert legend(GradientFlowPlan.n_wise(4, 2))[2] == "relay (input gradient)"
    assert "backward, both gradients" in legend(GradientFlowPlan.end_to_end(3))


def test_it_stands_alone_and_has_a_dark_mode():
    text = render_svg([_simulated()])
    assert "prefers-color-scheme: dark" in text
    addresses = set(re.findall(r"(?:https?:)?//[^\"'\s)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "@font-face" not in text


def test_work_without_duration_is_drawn():
    nothing = CostModel(forward=0, input_gradient=0, weight_gradient=0, head=0)
    svg = _parse(render_svg([_simulated(costs=nothing)]))
    assert {box["width"] for _, box, _ in _boxes(svg)} == {"0.00"}


def test_nothing_to_draw():
    with pytest.raises(ScheduleError, match="no timeline to draw"):
        render_svg([])
    with pytest.raises(ScheduleError, match="timeline 'measured' has no spans"):
        render_svg([_simulated(), Timeline("measured", "s", ((), ()))])
