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

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from benchmarks import results
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.program import training_program
from ds_interlock.schedule.simulate import simulate
from measuring.engines import make_engine, run_ranks, seconds_of_a_batch
from measuring.sleeping import HEAD_SHARE, equal_bounds, equal_stages


@dataclass(frozen=True)
class Side:
    """A plan that is run with or without a measure; what its gradients cost each stage, in forwards."""

    window: float | None = 2
    """None: deep supervision."""
    kind: type[GradientFlowPlan] = GradientFlowPlan
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    needless_relays: bool = False
    """With an input gradient for every loss that goes no further than its stage."""

    def plan(self, stage_bounds: list[int]) -> GradientFlowPlan:
        """The plan of stages that are cut there."""
        if self.window is None:
            return self.kind.deep_supervision(stage_bounds=stage_bounds)
        return self.kind.n_wise(window=self.window, stage_bounds=stage_bounds)

    def weight_gradients(self, plan: GradientFlowPlan) -> list[float]:
        """Of each stage; needless relays count as a part of them."""
        needless = [len(plan.trained_by[k].difference(plan.relays(k))) for k in range(plan.num_stages)]
        return [self.weight_gradient + self.needless_relays * number for number in needless]


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


MEASURES: dict[str, tuple[str, Side, Side]] = {
    "input gradient only": ("window 2", Side(), Side(input_gradient=2.0, weight_gradient=0.0)),
    "summed losses": ("deep supervision, two passes", Side(None, _TwoPasses), Side(None, _LossesApart)),
    "one backward pass": ("deep supervision", Side(None), Side(None, _TwoPasses)),
    "relays first": ("window 2", Side(), Side(kind=_RelaysLast)),
    "heads inside a stage": ("window 1.25", Side(1.25), Side(1.25, _HeadsLast)),
    "skipped relays": ("window 2", Side(), Side(needless_relays=True)),
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
        measured = [run_ranks(measure, args.stages, side=side, **how)[0] for side in sides]
        for m in args.micro_batches:
            row = {"measure": name, "plan": plan_name, "micro_batches": m}
            for source, (with_it, without) in (
                ("simulated", [simulated_forwards(side, args.stages, m) for side in sides]),
                ("measured", [of_side[m] for of_side in measured]),
            ):
                row |= {f"{source}_with": with_it, f"{source}_without": without}
                row[f"{source}_gain"] = without / with_it
            rows.append(row)
    results.publish("relays", args, rows, argv)


def simulated_forwards(side: Side, num_stages: int, num_micro_batches: int) -> float:
    """What the simulator says a batch takes, in forwards of a stage."""
    plan = side.plan(equal_bounds(num_stages))
    weight_gradients = side.weight_gradients(plan)
    costs = CostModel(input_gradient=side.input_gradient, weight_gradient=weight_gradients, head=HEAD_SHARE)
    return simulate(training_program(plan, num_micro_batches), costs, num_batches=10).batch_seconds


def measure(side: Side, seconds: float, micro_batches: list[int], num_batches: int) -> dict[int, float]:
    """On every rank of a job: a batch in forwards of a stage, by its number of micro-batches."""
    plan = side.plan(equal_bounds(dist.get_world_size()))
    work = equal_stages(seconds, side.weight_gradients(plan), side.input_gradient)
    work = replace(work, stage_bounds=plan.stage_bounds, plan=side.plan)
    engine = make_engine(work, {"mode": "interlock", "window": 2})  # its plan is not used
    return {m: seconds_of_a_batch(engine, work, m, num_batches) / seconds for m in micro_batches}


if __name__ == "__main__":
    main()
