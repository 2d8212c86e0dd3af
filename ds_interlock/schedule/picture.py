"""A plan as a picture in text: which loss trains which stage.

Four stages, window 2, ``combine="farthest"``:

      stage 0     stage 1     stage 2     stage 3     stage
    =========== =========== =========== ===========
        0-2         3-4         5-6         7-8       layers
    <-----------..........o                           loss 0, after layer 4
                <-----------..........o               loss 1, after layer 6
                            <---------------------o   the final loss
    --- trains the stage    ... passes through it
"""

from ds_interlock.schedule.plan import GradientFlowPlan

_WIDE, _NARROW = 12, 6
_MAX_WIDE_STAGES = 8


def draw_plan(plan: GradientFlowPlan) -> str:
    """The lines of the picture, without a newline at the end."""
    width = _WIDE if plan.num_stages <= _MAX_WIDE_STAGES else _NARROW
    stages = range(plan.num_stages)
    prefix = "stage " if width == _WIDE else ""
    ranges = [(plan.stage_bounds[stage], plan.stage_bounds[stage + 1] - 1) for stage in stages]
    layers = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    lines = [
        "".join(f"{prefix}{stage}".center(width) for stage in stages) + "  stage",
        "".join("=" * (width - 1) + " " for _ in stages),
        "".join(text.center(width) for text in layers) + "  layers",
        *(_arrow(plan, loss, width) for loss in range(len(plan.heads))),
    ]
    if any("." in line.partition("o")[0] for line in lines[3:]):
        lines.append("--- trains the stage    ... passes through it")
    return "\n".join(line.rstrip() for line in lines)


def _arrow(plan: GradientFlowPlan, loss: int, width: int) -> str:
    head = plan.heads[loss]
    start, stop = plan.stage_bounds[head.stage], plan.stage_bounds[head.stage + 1]
    share = (head.after_layer - start) / (stop - start)
    # Room for the gap between stages and for the head's own sign.
    end = head.stage * width + max(1, round(share * (width - 1))) - 1
    first = min(stage for stage, losses in enumerate(plan.trained_by) if loss in losses)
    trained = [loss in plan.trained_by[column // width] for column in range(first * width, end)]
    line = "".join("-" if here else "." for here in trained)
    name = "the final loss" if loss == plan.final else f"loss {loss}, after layer {head.after_layer - 1}"
    weight = "" if head.weight == 1 else f", weight {head.weight:g}"
    picture = " " * (first * width) + "<" + line[1:] + "o"
    return picture.ljust(plan.num_stages * width) + f"  {name}{weight}"
