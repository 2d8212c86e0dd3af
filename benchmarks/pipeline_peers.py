"""Throughput of a pipeline of sleeping stages: this package's modes beside DeepSpeed's engine and torch's.

    python -m benchmarks.pipeline_peers --output pipeline_peers.json

Every stage sleeps ``--milliseconds`` in the forward, for the input gradient and for the weight
gradient; an auxiliary head sleeps 0.3 of that. Torch's interleaved and zero-bubble schedules have two
stages of half the length on every rank. Each engine runs in processes of its own, one after the other.
For each engine, number of stages K and number of micro-batches M: the seconds a batch takes once the
pipeline is running, how many times faster than DeepSpeed's engine that is, what the simulator predicts,
and the distance to the floor (no bubble, no extra work: 3 t a micro-batch).

A sleeping stage takes a few per cent longer than it sleeps. So every process first times its own stage
alone, and the prediction is the simulator's at those costs: what is missing to 100 % is the engine's.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from benchmarks import results
from benchmarks.engines import DEEPSPEED, MODES, make_engine, seconds_of_a_batch
from benchmarks.ranks import run_ranks
from benchmarks.sleeping_stages import HEAD_SHARE, predicted_seconds, sleeping_workload, stage_costs
from benchmarks.torch_peers import TORCH_SCHEDULES

ENGINES = (*TORCH_SCHEDULES, "global", "local", "window 1.25", "window 1.25, 1 extra", "window 2")
TOLERANCE = 0.05
"""How far a measured figure may be from its prediction."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and returns the results."""
    args = _arguments(argv)
    rows = []
    for num_stages in args.stages:
        measured = {}
        for engine in (DEEPSPEED, *args.engines):
            print(f"{num_stages} stages: {engine} ...", flush=True)
            measured[engine] = run_ranks(
                measure,
                num_stages,
                engine_name=engine,
                seconds=args.milliseconds / 1000,
                num_batches={m: _num_batches(args, m) for m in args.micro_batches},
            )
        rows += _rows(num_stages, args, measured)
    found = results.collect("pipeline_peers", args, rows, argv)
    results.publish(found, args.output)
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[2, 4, 8], help="pipeline stages, a process each (2 4 8)"
    )
    parser.add_argument(
        "--micro_batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of a batch (1 2 4 8 16)"
    )
    results.add_choice(parser, "--engines", ENGINES, "measured beside DeepSpeed's")
    parser.add_argument("--milliseconds", type=float, default=40.0, help="one sleep of a stage (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="work of a stage that goes into each figure, as far as 2 to 8 batches make it (%(default)s)",
    )
    results.add_output(parser)
    return parser.parse_args(argv)


def _num_batches(args: argparse.Namespace, num_micro_batches: int) -> int:
    batch_seconds = 3 * args.milliseconds / 1000 * num_micro_batches
    return min(max(round(args.seconds / batch_seconds), 2), 8)


def measure(engine_name: str, seconds: float, num_batches: dict[int, int]) -> dict[str, Any]:
    """On every rank of a job: times one engine.

    Args:
        engine_name: DeepSpeed's, or one of ``ENGINES``.
        seconds: One sleep of a stage.
        num_batches: For each number of micro-batches the batches to time.

    Returns:
        ``seconds``: by number of micro-batches those of a batch, or why the engine refuses;
        ``costs``: of this stage, for the simulator.
    """
    work = sleeping_workload(dist.get_world_size(), seconds)
    engine = make_engine(engine_name, work)
    costs = stage_costs(engine, work, HEAD_SHARE * seconds) if engine_name in MODES else None
    found: dict[int, float | str] = {}
    for num_micro_batches, num in num_batches.items():
        try:
            found[num_micro_batches] = seconds_of_a_batch(engine, work, num_micro_batches, num)
        except ValueError as error:
            found[num_micro_batches] = " ".join(str(error).split())
    return {"seconds": found, "costs": costs}


def _rows(
    num_stages: int, args: argparse.Namespace, measured: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    rows = []
    for num_micro_batches in args.micro_batches:
        deepspeed_seconds = measured[DEEPSPEED][0]["seconds"][num_micro_batches]
        floor_seconds = 3 * args.milliseconds / 1000 * num_micro_batches
        for engine, ranks in measured.items():
            row: dict[str, Any] = {"stages": num_stages, "micro_batches": num_micro_batches, "engine": engine}
            seconds = ranks[0]["seconds"][num_micro_batches]
            if isinstance(seconds, str):
                row["refused"] = seconds
            else:
                row["seconds"] = seconds
                row["times_deepspeed"] = deepspeed_seconds / seconds
                row["times_floor"] = seconds / floor_seconds
            if engine in MODES:
                predicted = predicted_seconds(
                    MODES[engine], [rank["costs"] for rank in ranks], num_micro_batches
                )
                row["predicted_seconds"] = predicted
                row["share_of_predicted_speed"] = predicted / row["seconds"]
            rows.append(row)
    return rows


def table(found: dict[str, Any]) -> str:
    """The measurements, and how far the farthest is from its prediction, as Markdown."""
    rows = found["rows"]
    header = [
        "K",
        "M",
        "engine",
        "s/batch",
        "times DeepSpeed",
        "predicted s",
        "% of predicted",
        "times floor",
    ]
    lines = [
        (
            row["stages"],
            row["micro_batches"],
            row["engine"],
            row.get("seconds"),
            row.get("times_deepspeed"),
            row.get("predicted_seconds"),
            100 * row["share_of_predicted_speed"] if "share_of_predicted_speed" in row else None,
            row.get("times_floor"),
        )
        for row in rows
    ]
    reasons = sorted({f"{row['engine']}: {row['refused']}" for row in rows if "refused" in row})
    notes = [f"Empty, since refused. {reason}" for reason in reasons]
    return "\n\n".join([results.markdown(header, lines), *notes, _verdict(rows)])


def _verdict(rows: list[dict[str, Any]]) -> str:
    predicted = [row for row in rows if "share_of_predicted_speed" in row]
    if not predicted:
        return "No engine with a prediction was measured."
    outside = [row for row in predicted if abs(row["share_of_predicted_speed"] - 1) > TOLERANCE]
    worst = max(predicted, key=lambda row: abs(row["share_of_predicted_speed"] - 1))
    share = 100 * worst["share_of_predicted_speed"]
    where = f"{worst['engine']}, K={worst['stages']}, M={worst['micro_batches']}"
    return (
        f"{len(predicted) - len(outside)} of {len(predicted)} figures are within {TOLERANCE:.0%} of their "
        f"prediction; the farthest is {where} with {share:.1f} % of the predicted speed."
    )


def draw(found: dict[str, Any]) -> Any:
    """Speed relative to DeepSpeed's engine over M, a plot for each K; dotted what is predicted."""
    rows = found["rows"]
    stages = sorted({row["stages"] for row in rows})
    figure, axes = results.new_figure(len(stages), "Speed of a pipeline of sleeping stages")
    for axis, num_stages in zip(axes[0], stages, strict=True):
        here = [row for row in rows if row["stages"] == num_stages]
        base = {row["micro_batches"]: row["seconds"] for row in here if row["engine"] == DEEPSPEED}
        for number, engine in enumerate(dict.fromkeys(row["engine"] for row in here)):
            for key, style, label in (("seconds", "o-", engine), ("predicted_seconds", ":", None)):
                of_engine = [row for row in here if row["engine"] == engine and key in row]
                speeds = [base[row["micro_batches"]] / row[key] for row in of_engine]
                num_micro_batches = [row["micro_batches"] for row in of_engine]
                axis.plot(num_micro_batches, speeds, style, color=f"C{number}", label=label)
        axis.set(title=f"K = {num_stages}", xlabel="micro-batches a batch", xscale="log", ylim=(0, None))
        axis.set_xticks(list(base), list(base))
        axis.minorticks_off()
    axes[0, 0].set_ylabel("times DeepSpeed's engine (dotted: predicted)")
    results.add_legend(figure, axes[0, 0])
    return figure


if __name__ == "__main__":
    main()
