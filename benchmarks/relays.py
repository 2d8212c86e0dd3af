"""What makes relays cheap, each measure with it and without, simulated and on sleeping stages.

    python -m benchmarks.relays --output relays.json

A relay sends the gradient of a loss to the previous stage. The measures:

input gradient only   a relay computes no weight gradients; without, it costs a whole backward pass
summed losses         losses that train the same upstream stages travel as one tensor; without, each by itself
one backward pass     where a stage relays exactly what trains it, relay and weight gradient are one pass;
                      without, two
relays first          a ready relay goes before a ready weight gradient; without, after it
heads inside a stage  of a fractional window run when the layers before them are done; without, after
                      the whole forward
skipped relays        no input gradient where no stage upstream needs it; without, one for every loss that
                      trains a stage (in the sleeping stages as a longer weight gradient)

Times are in forwards of a stage, for each batch once the pipeline is running. Every stage sleeps as long
for its forward, its input gradient and its weight gradient, a head 0.3 of that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from deepspeed.pipe import LayerSpec

from benchmarks import results
from benchmarks.sleeping_stages import HEAD_SHARE, LAYERS_PER_STAGE, WIDTH, sleeping_workload
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.lower import training_program
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.simulate import simulate
from measuring.engines import make_engine, seconds_of_a_batch
from measuring.ranks import run_ranks
from measuring.results import add_legend, markdown, new_figure
from measuring.sleeping import SleepingLayer

MakePlan = Callable[[list[int]], GradientFlowPlan]


@dataclass(frozen=True)
class Side:
    """A plan that is run with or without a measure.

    Attributes:
        plan: Makes the plan from the stage bounds.
        input_gradient: What an input gradient costs, in forwards.
        weight_gradient: What a weight gradient costs each stage on top of that, in forwards.
    """

    plan: MakePlan
    input_gradient: float = 1.0
    weight_gradient: Callable[[GradientFlowPlan], list[float]] = lambda plan: [1.0] * plan.num_stages


class _EachAlone(GradientFlowPlan):
    """A plan in which no losses travel summed."""

    def bundles(self, stage: int) -> tuple[tuple[int, ...], ...]:
        return tuple((loss,) for bundle in super().bundles(stage) for loss in bundle)


class _RelaysLast(GradientFlowPlan):
    """A plan whose stages do all other work before a relay."""

    urgency = (*GradientFlowPlan.urgency[1:], Kind.INPUT_GRADIENT)


class _TwoPasses(GradientFlowPlan):
    """A plan whose stages compute input and weight gradients apart."""

    merges_passes = False


class _HeadsAfterTheForward(GradientFlowPlan):
    """A plan in which a head within a stage waits for the end of the stage."""

    def forward_part(self, loss: int) -> tuple[int, ...]:
        return ()


def _window(window: float, kind: type[GradientFlowPlan] = GradientFlowPlan) -> MakePlan:
    return lambda bounds: kind.n_wise(window=window, stage_bounds=bounds)


def _deep(kind: type[GradientFlowPlan] = GradientFlowPlan) -> MakePlan:
    return lambda bounds: kind.deep_supervision(stage_bounds=bounds)


def _with_needless_relays(plan: GradientFlowPlan) -> list[float]:
    """A weight gradient, and an input gradient for every loss that goes no further than its stage."""
    return [1.0 + len(plan.trained_by[k].difference(plan.relays(k))) for k in range(plan.num_stages)]


def _no_weight_gradient(plan: GradientFlowPlan) -> list[float]:
    return [0.0] * plan.num_stages


_TWO = Side(_window(2))
_DEEP_IN_TWO = Side(_deep(_TwoPasses))
MEASURES: dict[str, tuple[str, Side, Side]] = {
    "input gradient only": (
        "window 2",
        _TWO,
        replace(_TWO, input_gradient=2.0, weight_gradient=_no_weight_gradient),
    ),
    "summed losses": ("deep supervision, two passes", _DEEP_IN_TWO, Side(_deep(_EachAlone))),
    "one backward pass": ("deep supervision", Side(_deep()), _DEEP_IN_TWO),
    "relays first": ("window 2", _TWO, Side(_window(2, _RelaysLast))),
    "heads inside a stage": (
        "window 1.25",
        Side(_window(1.25)),
        Side(_window(1.25, _HeadsAfterTheForward)),
    ),
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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and returns the results."""
    args = results.parse(__doc__, OPTIONS, argv)
    how = {"micro_batches": args.micro_batches, "num_batches": args.batches}
    rows = []
    for name in args.measures:
        plan_name, *sides = MEASURES[name]
        print(f"{name} ...", flush=True)
        measured = [
            run_ranks(
                measure, args.stages, name=name, side_number=side, seconds=args.milliseconds / 1000, **how
            )[0]
            for side in range(len(sides))
        ]
        for number, m in enumerate(args.micro_batches):
            simulated = [simulated_forwards(side, args.stages, m) for side in sides]
            figures = {
                "simulated_with": simulated[0],
                "simulated_without": simulated[1],
                "measured_with": measured[0][number],
                "measured_without": measured[1][number],
            }
            rows.append({"measure": name, "plan": plan_name, "micro_batches": m, **figures})
    return results.publish("relays", args, rows, argv)


def simulated_forwards(side: Side, num_stages: int, num_micro_batches: int) -> float:
    """What the simulator says a batch takes, in forwards of a stage."""
    plan = side.plan([LAYERS_PER_STAGE * stage for stage in range(num_stages + 1)])
    costs = CostModel(
        input_gradient=side.input_gradient, weight_gradient=side.weight_gradient(plan), head=HEAD_SHARE
    )
    return simulate(training_program(plan, num_micro_batches), costs, num_batches=10).batch_seconds


def measure(
    name: str, side_number: int, seconds: float, micro_batches: list[int], num_batches: int
) -> list[float]:
    """On every rank of a job: times a measure (side 0 with it, 1 without), in forwards of a stage."""
    side = MEASURES[name][1 + side_number]
    work = sleeping_workload(dist.get_world_size(), seconds)
    plan = side.plan(work.bounds(dist.get_world_size()))
    share = seconds / LAYERS_PER_STAGE
    layers = [
        LayerSpec(SleepingLayer, WIDTH, share, side.input_gradient * share, weight_gradient * share)
        for weight_gradient in side.weight_gradient(plan)
        for _ in range(LAYERS_PER_STAGE)
    ]
    work = replace(work, layers=layers, plan=side.plan)
    engine = make_engine(work, {"mode": "interlock", "window": 2})  # the plan is the side's
    return [seconds_of_a_batch(engine, work, m, num_batches) / seconds for m in micro_batches]


def table(found: dict[str, Any]) -> str:
    """Every measure with and without, as Markdown."""
    header = ["measure", "plan", "M"]
    lines = [[row["measure"], row["plan"], row["micro_batches"]] for row in found["rows"]]
    for how in ("simulated", "measured"):
        header += [f"{how}: with", "without", "gain"]
        for line, row in zip(lines, found["rows"], strict=True):
            with_it, without = row[f"{how}_with"], row[f"{how}_without"]
            line += [with_it, without, without / with_it]
    arguments = found["arguments"]
    note = (
        f"Time of a batch in forwards of a stage; {arguments['stages']} stages; "
        f"a forward is {arguments['milliseconds']:g} ms."
    )
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
