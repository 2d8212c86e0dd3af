"""Throughput of a pipeline of sleeping stages: this package's modes beside DeepSpeed's engine and torch's.

    python -m benchmarks.pipeline_peers --output pipeline_peers.json

Every stage sleeps ``--milliseconds`` in the forward, for the input gradient and for the weight
gradient; an auxiliary head sleeps 0.3 of that. Each engine runs in processes of its own. For each engine,
number of stages K and number of micro-batches M: the seconds a batch takes once the pipeline is running,
how many times faster than DeepSpeed's engine that is, what the simulator predicts, and the distance to the
floor (no bubble, no extra work: 3 t per micro-batch).

A sleeping stage takes a few per cent longer than it sleeps. So every process first times its own stage
alone, and the prediction is the simulator's at those costs: what is missing to 100 % is the engine's.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from benchmarks import results
from benchmarks.peers import DEEPSPEED, MODES, TORCH_SCHEDULES, compare, make_peer, time_batches
from benchmarks.sleeping_stages import HEAD_SHARE, equal_stages, predicted_seconds, stage_costs
from measuring.ranks import run_ranks
from measuring.results import add_legend, new_figure, table_of

ENGINES = (*TORCH_SCHEDULES, "global", "local", "window 1.25", "window 1.25, 1 extra", "window 2")
TOLERANCE = 0.05
"""How far a measured figure may be from its prediction."""

OPTIONS: results.Options = {
    "stages": ([2, 4, 8], "pipeline stages, a process each"),
    "micro_batches": ([1, 2, 4, 8, 16], "of a batch"),
    "engines": (list(ENGINES), "measured beside DeepSpeed's", ENGINES),
    "milliseconds": (40.0, "one sleep of a stage"),
    "seconds": (2.0, "work of a stage for each figure, as far as 2 to 8 batches make it"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    floor = {m: 3 * args.milliseconds / 1000 * m for m in args.micro_batches}
    num_batches = {m: min(max(round(args.seconds / seconds), 2), 8) for m, seconds in floor.items()}
    rows = []
    for num_stages in args.stages:
        measured = {}
        for engine in (DEEPSPEED, *args.engines):
            print(f"{num_stages} stages: {engine} ...", flush=True)
            how = {"engine_name": engine, "seconds": args.milliseconds / 1000, "num_batches": num_batches}
            measured[engine] = run_ranks(measure, num_stages, **how)
        for m in args.micro_batches:
            deepspeed = measured[DEEPSPEED][0][0][m]
            for engine, of_ranks in measured.items():
                row = {"stages": num_stages, "micro_batches": m, "engine": engine}
                row |= compare(of_ranks[0][0][m], deepspeed, floor[m])
                if engine in MODES:
                    predicted = predicted_seconds(MODES[engine], [costs for _, costs in of_ranks], m)
                    row["predicted_seconds"] = predicted
                    row["share_of_predicted_speed"] = predicted / row["seconds"]
                rows.append(row)
    results.publish("pipeline_peers", args, rows, argv)


def measure(
    engine_name: str, seconds: float, num_batches: dict[int, int]
) -> tuple[dict[int, float | str], dict[str, float] | None]:
    """On every rank of a job: ``time_batches`` of an engine, and this stage's costs under our modes."""
    work = equal_stages(dist.get_world_size(), seconds)
    engine = make_peer(engine_name, work)
    costs = stage_costs(engine, work, HEAD_SHARE * seconds) if engine_name in MODES else None
    return time_batches(engine, work, num_batches), costs


def table(found: dict[str, Any]) -> str:
    """The measurements, and the one that is farthest from its prediction, as Markdown."""
    rows = found["rows"]
    columns = {
        "K": "stages",
        "M": "micro_batches",
        "engine": "engine",
        "s/batch": "seconds",
        "times DeepSpeed": "times_deepspeed",
        "predicted s": "predicted_seconds",
        "% of predicted": ("share_of_predicted_speed", 0.01),
        "times floor": "times_floor",
    }
    reasons = {f"Empty, since refused. {row['engine']}: {row['refused']}" for row in rows if "refused" in row}
    return "\n\n".join([table_of(rows, columns), *sorted(reasons), _verdict(rows)])


def _verdict(rows: list[dict[str, Any]]) -> str:
    predicted = [row for row in rows if "share_of_predicted_speed" in row]
    if not predicted:
        return "No engine with a prediction was measured."
    outside = [row for row in predicted if abs(row["share_of_predicted_speed"] - 1) > TOLERANCE]
    worst = max(predicted, key=lambda row: abs(row["share_of_predicted_speed"] - 1))
    share = 100 * worst["share_of_predicted_speed"]
    where = f"{worst['engine']}, K={worst['stages']}, M={worst['micro_batches']}"
    within = f"{len(predicted) - len(outside)} of {len(predicted)} figures are within {TOLERANCE:.0%}"
    return f"{within} of their prediction; the farthest is {where} with {share:.1f} % of the predicted speed."


def draw(found: dict[str, Any]) -> Any:
    """Speed relative to DeepSpeed's engine over M, a plot for each K; dotted what is predicted."""
    by_stages = results.grouped(found["rows"], "stages")
    figure, axes = new_figure(len(by_stages), "Speed of a pipeline of sleeping stages")
    for axis, (num_stages, rows) in zip(axes[0], by_stages.items(), strict=True):
        by_engine = results.grouped(rows, "engine")
        base = {row["micro_batches"]: row["seconds"] for row in by_engine[DEEPSPEED]}
        for number, (engine, of_engine) in enumerate(by_engine.items()):
            for key, style, label in (("seconds", "o-", engine), ("predicted_seconds", ":", None)):
                with_key = {row["micro_batches"]: row[key] for row in of_engine if key in row}
                speeds = [base[m] / seconds for m, seconds in with_key.items()]
                axis.plot(list(with_key), speeds, style, color=f"C{number}", label=label)
        axis.set(title=f"K = {num_stages}", xlabel="micro-batches per batch", xscale="log", ylim=(0, None))
        axis.set_xticks(list(base), list(base))
        axis.minorticks_off()
    axes[0, 0].set_ylabel("times DeepSpeed's engine (dotted: predicted)")
    add_legend(figure, axes[0, 0])
    return figure


if __name__ == "__main__":
    main()
