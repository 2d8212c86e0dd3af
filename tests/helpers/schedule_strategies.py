"""What the schedule's tests share: hypothesis strategies, and grids typed as text."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st

from ds_interlock.errors import PlanError
from ds_interlock.schedule import CostModel, GradientFlowPlan, Program, training_program
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.dependency import receive_of, receives_needed
from ds_interlock.schedule.standstill import Place

# Derandomized: a failure on one machine is a failure on all.
quick = settings(max_examples=60, deadline=None, derandomize=True)

_UNITS = st.sampled_from([0.0, 0.25, 1.0, 1.5, 4.0])


@st.composite
def plans(draw: st.DrawFn, max_stages: int = 7) -> GradientFlowPlan:
    """Any plan of ``n_wise``, or deep supervision, over stages of unequal numbers of layers."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=max_stages))
    bounds = [sum(sizes[:end]) for end in range(len(sizes) + 1)]
    if draw(st.integers(0, 9)) == 0:
        return GradientFlowPlan.deep_supervision(stage_bounds=bounds, head_weight=0.5)
    span = draw(st.integers(1, len(sizes)))
    fraction = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.75])) if span < len(sizes) else 0.0
    stride = draw(st.integers(1, span))
    combine = draw(st.sampled_from(["sum", "farthest"]))
    return GradientFlowPlan.n_wise(
        window=span + fraction, combine=combine, head_stride=stride, stage_bounds=bounds, head_weight=0.5
    )


def lowered(plan: GradientFlowPlan, num_micro_batches: int, extra: int, *, receive_ahead: int) -> Program:
    """The training program with so many receives ahead, whether or not its stages wait for each other."""
    with (
        patch("ds_interlock.schedule.lower.RECEIVE_AHEAD", receive_ahead),
        patch("ds_interlock.schedule.lower.standstill", return_value=[]),
        patch("ds_interlock.schedule.verify.standstill", return_value=[]),
    ):
        return training_program.__wrapped__(plan, num_micro_batches, extra_in_flight=extra)


def places(program: Program, wanted: Callable[[Action], bool]) -> list[Place]:
    """Where the actions are that are ``wanted``."""
    return [
        (stage, position)
        for stage, actions in enumerate(program.stages)
        for position, action in enumerate(actions)
        if wanted(action)
    ]


def edit(program: Program, stage: int, actions: Sequence[Action]) -> Program:
    """The program with other actions on one stage."""
    return replace(program, stages=(*program.stages[:stage], tuple(actions), *program.stages[stage + 1 :]))


def crossings(program: Program) -> list[tuple[Action, Action]]:
    """Sends of a forward and of a gradient over one link, each before its stage needs the other one."""
    taken: list[dict[Action, int]] = [{} for _ in program.stages]
    for stage, position in places(program, lambda _: True):
        for receive in receives_needed(program.plan, program.stages[stage][position]):
            taken[stage].setdefault(receive, position)
    return [
        (forward, gradient)
        for (stage, position), (other, also) in product(
            places(program, lambda action: action.kind is Kind.SEND_FORWARD),
            places(program, lambda action: action.kind is Kind.SEND_GRADIENT),
        )
        if other == stage + 1
        for forward, gradient in [(program.stages[stage][position], program.stages[other][also])]
        if position < taken[stage][receive_of(gradient)] and also < taken[other][receive_of(forward)]
    ]


def receives_behind(program: Program, forward: Action, gradient: Action) -> Program:
    """Of ``crossings``: each of the two stages posts what the other one sends only behind its own send."""
    for send, receive in ((forward, receive_of(gradient)), (gradient, receive_of(forward))):
        actions = list(program.stages[send.stage])
        link = [action for action in actions if action.kind is receive.kind]
        late = [a for a in link[link.index(receive) :] if actions.index(a) < actions.index(send)]
        actions = [action for action in actions if action not in late]
        place = actions.index(send) + 1
        program = edit(program, send.stage, [*actions[:place], *late, *actions[place:]])
    return program


@st.composite
def costs(draw: st.DrawFn, num_stages: int) -> CostModel:
    """Any costs, those of the work different from stage to stage."""
    per_stage = st.lists(_UNITS, min_size=num_stages, max_size=num_stages)
    return CostModel(
        forward=draw(per_stage),
        input_gradient=draw(per_stage),
        weight_gradient=draw(per_stage),
        head=draw(per_stage),
        final_head=draw(_UNITS),
        optimizer=draw(per_stage),
        latency=draw(_UNITS),
        bandwidth=draw(st.sampled_from([0.5, 2.0, float("inf")])),
        forward_bytes=draw(_UNITS),
        gradient_bytes=draw(_UNITS),
    )


def grid(text: str) -> str:
    """A grid typed with its first line indented, as ``render_text`` gives it."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


def bounds_of(num_stages: int, layers: int) -> list[int]:
    """The bounds of stages of ``layers`` layers each."""
    return [layers * stage for stage in range(num_stages + 1)]


def where(plan: GradientFlowPlan) -> list[list[object]]:
    """``trained_by`` in terms of where the losses are: (stage, after_layer), or "final"."""
    return [
        [
            "final" if loss == plan.final else (plan.heads[loss].stage, plan.heads[loss].after_layer)
            for loss in sorted(losses)
        ]
        for losses in plan.trained_by
    ]


def stages_of(plan: GradientFlowPlan) -> list[list[object]]:
    """``trained_by`` in terms of the stages of the losses, the final one as "final"."""
    return [[at if at == "final" else at[0] for at in row] for row in where(plan)]


def plan_or_none(stage_bounds: Sequence[int], **arguments: object) -> GradientFlowPlan | None:
    """The plan, or None where there is none."""
    try:
        return GradientFlowPlan.n_wise(stage_bounds=stage_bounds, **arguments)
    except PlanError:
        return None
