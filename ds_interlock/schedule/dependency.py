"""The order of things: what must be done before an action. Stated here and nowhere else.

The compute order, the lowering, the verifier, the simulator and the renderer all call
``dependencies``. For micro-batch 0 of four stages under window 2 (``sum``; losses 0, 1, 2):

    stage 0   0F0 ────────────────────────────┐                  0W0
               └──► 1F0 ─► 1H0@0 ─► 1I0@0 ────┼───────────────────┘ needs loss 0
    stage 1              │    └───────────────┼──────► 1W0          needs losses 0 and 1
                         └──► 2F0 ─► 2H0@1 ─► 2I0@1 ────┘
"""

from dataclasses import replace

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import COMPUTE_KINDS, Action, Kind
from ds_interlock.schedule.plan import GradientFlowPlan


def stage_actions(plan: GradientFlowPlan, stage: int, micro_batch: int) -> tuple[Action, ...]:
    """All the work ``stage`` does for ``micro_batch``, in no particular order."""
    losses = plan.losses_at(stage)
    parts = [(loss,) for loss in losses if plan.is_inner(loss)]
    forward = [Action(stage, Kind.FORWARD, micro_batch, part) for part in (*parts, ())]
    heads = [Action(stage, Kind.HEAD, micro_batch, (loss,)) for loss in losses]
    return (*forward, *heads, *backward_actions(plan, stage, micro_batch))


def evaluation_actions(
    plan: GradientFlowPlan, stage: int, micro_batch: int, *, all_heads: bool
) -> tuple[Action, ...]:
    """The work of an evaluation: the forward, and the final loss or, with ``all_heads``, every loss."""
    work = [a for a in stage_actions(plan, stage, micro_batch) if a.kind in (Kind.FORWARD, Kind.HEAD)]
    return tuple(a for a in work if a.kind is Kind.FORWARD or all_heads or a.losses == (plan.final,))


def is_work(action: Action) -> bool:
    """True if ``action`` computes something for a micro-batch."""
    return action.kind in COMPUTE_KINDS and action.kind is not Kind.STEP


def batch_end(stage: int, num_micro_batches: int) -> tuple[Action, ...]:
    """What a stage ends a training batch with."""
    return Action(stage, Kind.REDUCE, num_micro_batches), Action(stage, Kind.STEP, num_micro_batches)


def backward_actions(plan: GradientFlowPlan, stage: int, micro_batch: int) -> tuple[Action, ...]:
    """The passes back through ``stage``: relays and weight gradient, or both in one.

    The first needs the activations of the forward, the last frees them.
    """
    if stage > 0 and plan.merges_passes:
        return (Action(stage, Kind.BACKWARD, micro_batch),)
    relays = [Action(stage, Kind.INPUT_GRADIENT, micro_batch, bundle) for bundle in plan.bundles(stage)]
    return (*relays, Action(stage, Kind.WEIGHT_GRADIENT, micro_batch))


def num_backward_passes(plan: GradientFlowPlan, stage: int) -> int:
    """How often the graph of a micro-batch is walked back on ``stage``."""
    return len(backward_actions(plan, stage, 0))


def received_bundles(
    plan: GradientFlowPlan, stage: int, losses: frozenset[int]
) -> tuple[tuple[int, ...], ...]:
    """The bundles from the next stage that carry gradients of ``losses``.

    A bundle is never split: what travels together trains the same stages.
    """
    if stage + 1 == plan.num_stages:
        return ()
    return tuple(bundle for bundle in plan.bundles(stage + 1) if losses.issuperset(bundle))


def dependencies(plan: GradientFlowPlan, action: Action) -> tuple[Action, ...]:
    """The actions that must be done before ``action`` may start; a ScheduleError if it is not in ``plan``.

    Within a stage, micro-batches go forward, and gradients accumulate, in their own order: results
    then never depend on timing.
    """
    if not 0 <= action.stage < plan.num_stages:
        raise ScheduleError(f"{action}: the plan has no stage {action.stage}")
    if action.kind in (Kind.STEP, Kind.REDUCE):
        numbers = range(action.micro_batch)
        work = tuple(needed for number in numbers for needed in stage_actions(plan, action.stage, number))
        ends = batch_end(action.stage, action.micro_batch)
        return (*work, *ends[: ends.index(action)])
    if action not in stage_actions(plan, action.stage, action.micro_batch):
        raise ScheduleError(f"{action} is not work that the plan asks of stage {action.stage}")
    before = (replace(action, micro_batch=action.micro_batch - 1),) if action.micro_batch else ()
    match action.kind:
        case Kind.FORWARD:
            return (*_forward_needs(plan, action), *before)
        case Kind.HEAD:
            part = plan.forward_part(action.losses[0])
            return (Action(action.stage, Kind.FORWARD, action.micro_batch, part), *before)
        case Kind.INPUT_GRADIENT:
            return _gradients(plan, action, frozenset(action.losses))
        case _:
            return (*_gradients(plan, action, plan.trained_by[action.stage]), *before)


def _forward_needs(plan: GradientFlowPlan, action: Action) -> tuple[Action, ...]:
    """The part of the forward before this one, which ended at a head, or the previous stage's forward."""
    stage, micro_batch = action.stage, action.micro_batch
    inner = [loss for loss in plan.losses_at(stage) if plan.is_inner(loss)]
    earlier = [loss for loss in inner if not action.losses or loss < action.losses[0]]
    if earlier:
        return (Action(stage, Kind.FORWARD, micro_batch, (earlier[-1],)),)
    return (Action(stage - 1, Kind.FORWARD, micro_batch),) if stage else ()


def _gradients(plan: GradientFlowPlan, action: Action, losses: frozenset[int]) -> tuple[Action, ...]:
    """What makes the gradients of ``losses`` at this stage: its own heads and the next stage."""
    stage, micro_batch = action.stage, action.micro_batch
    own = [Action(stage, Kind.HEAD, micro_batch, (loss,)) for loss in plan.losses_at(stage) if loss in losses]
    bundles = received_bundles(plan, stage, losses)
    if plan.merges_passes:
        received = [Action(stage + 1, Kind.BACKWARD, micro_batch) for _ in bundles]
    else:
        received = [Action(stage + 1, Kind.INPUT_GRADIENT, micro_batch, bundle) for bundle in bundles]
    return (*own, *received)


def send_of(plan: GradientFlowPlan, action: Action) -> Action | None:
    """The send of what ``action`` made, or None if it stays on its stage."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind is Kind.FORWARD and not action.losses and stage + 1 < plan.num_stages:
        return Action(stage, Kind.SEND_FORWARD, micro_batch)
    if action.kind is Kind.INPUT_GRADIENT:
        return Action(stage, Kind.SEND_GRADIENT, micro_batch, action.losses)
    if action.kind is Kind.BACKWARD:
        return Action(stage, Kind.SEND_GRADIENT, micro_batch, plan.bundles(stage)[0])
    return None


def receive_of(send: Action) -> Action:
    """The receive at the other end of ``send``."""
    if send.kind is Kind.SEND_FORWARD:
        return Action(send.stage + 1, Kind.RECV_FORWARD, send.micro_batch)
    kind = Kind.RECV_COPY if send.kind is Kind.SEND_COPY else Kind.RECV_GRADIENT
    return Action(send.stage - 1, kind, send.micro_batch, send.losses)


def receives_needed(plan: GradientFlowPlan, action: Action) -> tuple[Action, ...]:
    """The receives that must be complete before the compute ``action`` can start."""
    if not is_work(action):
        return ()
    sends = [send_of(plan, needed) for needed in dependencies(plan, action) if needed.stage != action.stage]
    return tuple(receive_of(send) for send in sends if send is not None)
