"""What makes relays cheap: batches with and without each measure, simulated and on sleeping stages.

    python -m benchmarks.relays --output relays.json

A relay sends the gradient of a loss to the previous stage. The measures:

input gradient only   a relay computes no weight gradients; without, it costs a whole backward pass
summed losses         losses that train the same upstream stages travel as one tensor
one backward pass     where a stage relays exactly what trains it, it does so while it trains
relays first          a ready relay goes before a ready weight gradient; without, after it
heads inside a stage  of a fractional window run before the rest of the forward; without, after it
skipped relays        no input gradient where no upstream stage needs it; without, one for every loss that
                      trains a stage (in the sleeping stages as a longer weight gradient)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from benchmarks import results
from benchmarks.sleeping_stages import HEAD_SHARE, LAYERS_PER_STAGE, equal_bounds
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.program import training_program
from ds_interlock.schedule.simulate import simulate
from measuring.engines import make_engine, seconds_of_a_batch
from measuring.ranks import run_ranks
from measuring.results import add_legend, markdown, new_figure
from measuring.sleeping import sleeping_workload

MakePlan = Callable[[list[int]], GradientFlowPlan]


@dataclass(frozen=True)
class Side:
    """A plan that is run with or without a measure; what its gradients cost each stage, in forwards."""

    plan: MakePlan
    input_gradient: float = 1.0
    weight_gradient: Callable[[GradientFlowPlan], list[float]] = lambda plan: [1.0] * plan.num_stages


class _LossesApart(GradientFlowPlan):
    def bundles(self, stage: int) -> tuple[tuple[int, ...], ...]:
        return tuple((loss,) for bundle in super().bundles(stage) for loss in bundle)


class _RelaysLast(GradientFlowPlan):
    urgency = (*GradientFlowPlan.urgency[1:], Kind.INPUT_GRADIENT)


class _TwoPasses(GradientFlowPlan):
    merges_passes = False


class _HeadsLast(GradientFlowPlan):
    def forward_part(self, loss: int) -> tuple[int, ...]:
        return ()


def _window(window: float, kind: type[GradientFlowPlan] = GradientFlowPlan) -> MakePlan:
    return lambda bounds: kind.n_wise(window=window, stage_bounds=bounds)


def _deep(kind: type[GradientFlowPlan] = GradientFlowPlan) -> MakePlan:
    return lambda bounds: kind.deep_supervision(stage_bounds=bounds)


def _with_needless_relays(plan: GradientFlowPlan) -> list[float]:
    """With an input gradient for every loss that goes no further than its stage."""
    return [1.0 + len(plan.trained_by[k].difference(plan.relays(k))) for k in range(plan.num_stages)]


_TWO = Side(_window(2))
_DEEP_IN_TWO = Side(_deep(_TwoPasses))
MEASURES: dict[str, tuple[str, Side, Side]] = {
    "input gradient only": (
        "window 2",
        _TWO,
        replace(_TWO, input_gradient=2.0, weight_gradient=lambda plan: [0.0] * plan.num_stages),
    ),
    "summed losses": ("deep supervision, two passes", _DEEP_IN_TWO, Side(_deep(_LossesApart))),
    "one backward pass": ("deep supervision", Side(_deep()), _DEEP_IN_TWO),
    "relays first": ("window 2", _TWO, Side(_window(2, _RelaysLast))),
    "heads inside a stage": ("window 1.25", Side(_window(1.25)), Side(_window(1.25, _HeadsLast))),
    "skipped relays": ("window 2", _TWO, replace(_TWO, weight_gradient=_with_needless_relays)),
}
"""For each measure the plan it is shown on, and that plan with it and without."""

OPTIONS: results.Options = {
    "measures": (list(MEASURES), "what is measured", MEASURES),
    "stages": (4, "pipeline stages, a process each"),
    "micro_batches": ([1, 4], "of a batch"),
    "milliseconds": (40.0, "one sleep of a stage"),
    "batches": (6, "timed, after two that are not"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    seconds = args.milliseconds / 1000
    how = {"seconds": seconds, "micro_batches": args.micro_batches, "num_batches": args.batches}
    rows = []
    for name in args.measures:
        plan_name, *sides = MEASURES[name]
        print(f"{name} ...", flush=True)
        measured = [run_ranks(measure, args.stages, name=name, side=side, **how)[0] for side in range(2)]
        for m in args.micro_batches:
            row = {"measure": name, "plan": plan_name, "micro_batches": m}
            simulated = [simulated_forwards(side, args.stages, m) for side in sides]
            row |= {"simulated_with": simulated[0], "simulated_without": simulated[1]}
            rows.append(row | {"measured_with": measured[0][m], "measured_without": measured[1][m]})
    results.publish("relays", args, rows, argv)


def simulated_forwards(side: Side, num_stages: int, num_micro_batches: int) -> float:
    """What the simulator says a batch takes, in forwards of a stage."""
    plan = side.plan(equal_bounds(num_stages))
    costs = CostModel(
        input_gradient=side.input_gradient, weight_gradient=side.weight_gradient(plan), head=HEAD_SHARE
    )
    return simulate(training_program(plan, num_micro_batches), costs, num_batches=10).batch_seconds


def measure(
    name: str, side: int, seconds: float, micro_batches: list[int], num_batches: int
) -> dict[int, float]:
    """On every rank of a job: a batch in forwards of a stage, with a measure (side 0) or without (1)."""
    with_or_without = MEASURES[name][1 + side]
    plan = with_or_without.plan(equal_bounds(dist.get_world_size()))
    share = seconds / LAYERS_PER_STAGE
    layers = [
        (share, with_or_without.input_gradient * share, weight_gradient * share)
        for weight_gradient in with_or_without.weight_gradient(plan)
        for _ in range(LAYERS_PER_STAGE)
    ]
    work = sleeping_workload(layers, lambda position: HEAD_SHARE * seconds, stage_bounds=plan.stage_bounds)
    work = replace(work, plan=with_or_without.plan)
    engine = make_engine(work, {"mode": "interlock", "window": 2})  # its plan is not used
    return {m: seconds_of_a_batch(engine, work, m, num_batches) / seconds for m in micro_batches}


def table(found: dict[str, Any]) -> str:
    """Every measure with and without, as Markdown."""
    header, lines = ["measure", "plan", "M"], []
    for how in ("simulated", "measured"):
        header += [f"{how}: with", "without", "gain"]
    for row in found["rows"]:
        lines.append([row["measure"], row["plan"], row["micro_batches"]])
        for how in ("simulated", "measured"):
            with_it, without = row[f"{how}_with"], row[f"{how}_without"]
            lines[-1] += [with_it, without, without / with_it]
    stages, milliseconds = (found["arguments"][name] for name in ("stages", "milliseconds"))
    note = f"Time of a batch in forwards of a stage; {stages} stages; a forward is {milliseconds:g} ms."
    return f"{markdown(header, lines)}\n\n{note}"


def draw(found: dict[str, Any]) -> Any:
    """How many times longer a batch takes without each measure."""
    rows = found["rows"]
    figure, ((axis,),) = new_figure(1, "A batch without the measure, relative to with it")
    labels = [f"{row['measure']}\n{row['plan']}, M = {row['micro_batches']}" for row in rows]
    for offset, key in ((0.0, "simulated"), (0.4, "measured")):
        gains = [row[f"{key}_without"] / row[f"{key}_with"] for row in rows]
        axis.barh([number + offset for number in range(len(rows))], gains, 0.4, align="edge", label=key)
    axis.set_yticks([number + 0.4 for number in range(len(rows))], labels, fontsize="x-small")
    axis.axvline(1, linewidth=0.8, color="black")
    axis.invert_yaxis()
    add_legend(figure, axis)
    return figure


if __name__ == "__main__":
    main()
