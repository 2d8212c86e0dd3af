"""ZB-H1: the zero-bubble schedule at 1F1B's memory, as the line to beat with global gradients.

Global gradients need no auxiliary head, and yet most of the bubble goes if the backward pass is split
and weight gradients fill the waits. What interlocking saves must be held against that, not only
against 1F1B. DeepSpeed does not run this schedule; it is played through here for comparison.

Source: Qi, Wan, Huang, Lin: Zero Bubble Pipeline Parallelism. ICLR 2024, section 2.1.
"""

from dataclasses import replace

from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.cost import CostModel, LinkTimes
from ds_interlock.schedule.dependency import send_of
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.simulate import Rows, Simulation, Span


def zero_bubble_batch(plan: GradientFlowPlan, num_micro_batches: int, costs: CostModel) -> Rows:
    """One batch of the end-to-end ``plan`` under ZB-H1, without the optimizer step.

    At equal costs and M >= K it takes M (TF + TB + TW) + (K - 1) (TF + TB - TW), as in the paper.
    """
    orders = [_order(plan, stage, num_micro_batches) for stage in range(plan.num_stages)]
    rows: list[list[Span]] = [[] for _ in orders]
    done: dict[Action, float] = {}
    links = LinkTimes(costs)
    while any(len(row) < len(order) for row, order in zip(rows, orders, strict=True)):
        for row, order in zip(rows, orders, strict=True):
            for action in order[len(row) :]:
                start = row[-1].end if row else 0.0
                needed = _from_neighbour(plan, action)
                if needed is not None:
                    if needed not in done:
                        break
                    send = send_of(plan, needed)
                    assert send is not None
                    start = max(start, links.arrival(send, done[needed]))
                done[action] = start + _seconds(plan, costs, action)
                row.append(Span(action, 0, start, done[action]))
    return tuple(map(tuple, rows))


def zero_bubble_batches(
    plan: GradientFlowPlan, num_micro_batches: int, costs: CostModel, num_batches: int
) -> Simulation:
    """Batches under ZB-H1 one after the other, each ended by the optimizer step of all stages."""
    batch = zero_bubble_batch(plan, num_micro_batches, costs)
    flush = max(row[-1].end for row in batch)
    rows = []
    for stage, row in enumerate(batch):
        step = Action(stage, Kind.STEP, num_micro_batches)
        rows.append((*row, Span(step, 0, flush, flush + costs.seconds(plan, step))))
    seconds = max(row[-1].end for row in rows)
    busy = sum(span.end - span.start for row in rows for span in row)
    relays = [Action(stage, Kind.SEND_GRADIENT, 0) for stage in range(plan.num_stages)]
    return Simulation(
        spans=tuple(
            tuple(
                Span(span.action, batch, span.start + batch * seconds, span.end + batch * seconds)
                for batch in range(num_batches)
                for span in row
            )
            for row in rows
        ),
        batch_seconds=seconds,
        bubble_fraction=1.0 - busy / (seconds * plan.num_stages) if seconds else 0.0,
        in_flight=(min(plan.num_stages, num_micro_batches),) * plan.num_stages,
        relay_bytes=tuple(num_micro_batches * costs.message_bytes(relay) for relay in relays),
    )


def _order(plan: GradientFlowPlan, stage: int, num_micro_batches: int) -> list[Action]:
    """1F1B, its backward split: weight gradients follow ``stage`` micro-batches later, so that all hold K."""
    forwards = [Action(stage, Kind.FORWARD, number) for number in range(num_micro_batches)]
    weights = [Action(stage, Kind.WEIGHT_GRADIENT, number) for number in range(num_micro_batches)]
    ahead = plan.num_stages - stage
    order = forwards[:ahead]
    for number in range(num_micro_batches):
        order.append(Action(stage, Kind.INPUT_GRADIENT, number, (plan.final,)))
        order += weights[number - stage : number - stage + 1] if number >= stage else []
        order += forwards[number + ahead : number + ahead + 1]
    return order + weights[max(0, num_micro_batches - stage) :]


def _from_neighbour(plan: GradientFlowPlan, action: Action) -> Action | None:
    """The action of another stage that ``action`` waits for."""
    step = {Kind.FORWARD: -1, Kind.INPUT_GRADIENT: 1}.get(action.kind)
    if step is None or not 0 <= action.stage + step < plan.num_stages:
        return None
    return replace(action, stage=action.stage + step)


def _seconds(plan: GradientFlowPlan, costs: CostModel, action: Action) -> float:
    """As the cost model, with the weight gradient by itself and the final loss in the last forward."""
    seconds = costs.seconds(plan, action)
    if action.kind is Kind.WEIGHT_GRADIENT:
        return seconds - costs.seconds(plan, Action(action.stage, Kind.INPUT_GRADIENT, 0, (plan.final,)))
    if action.kind is Kind.FORWARD and action.stage == plan.num_stages - 1:
        return seconds + costs.final_head
    return seconds
