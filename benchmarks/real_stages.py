"""Two stages of a real Transformer on two cores: this package's modes beside DeepSpeed's engine and torch's.

    python -m benchmarks.real_stages --output real_stages.json

Each stage runs in a process of its own with one thread, in float32 on gloo, with SGD. Auxiliary heads are
``norm_linear``, on ``--token_fraction`` of the positions. For each engine and number of micro-batches M:
the seconds a batch takes, how many times faster than DeepSpeed's engine that is, what ``ds-interlock
plan`` predicts from the profile of these layers, and the distance to the floor: half the time in which a
process trains the whole model on the same batch. Profile and floor are measured while a second process
does the same, so that both cores are busy, as they are under a pipeline without a bubble.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import results
from benchmarks.peers import DEEPSPEED, MODES, TORCH_SCHEDULES, compare, make_peer, time_batches
from ds_interlock.config import HeadConfig, InterlockConfig
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.planning.forecast import forecast
from ds_interlock.planning.profile import Profile
from ds_interlock.profiling.layers import Stopwatch
from ds_interlock.profiling.link import measure_link
from ds_interlock.profiling.model import calls_in_sequence, device_name, profile_model
from measuring.engines import LEARNING_RATE, Workload
from measuring.ranks import run_ranks
from measuring.results import add_legend, new_figure, table_of

NUM_STAGES = 2
FLOOR = "floor"
ENGINES = [name for name in (*TORCH_SCHEDULES, *MODES) if name != "window 2"]  # is global here
OPTIONS: results.Options = {
    "engines": (ENGINES, "measured beside DeepSpeed's", ENGINES),
    "micro_batches": ([1, 2, 4], "of a batch"),
    "batches": (5, "timed, after two that are not"),
    "rounds": (3, "of all engines; the median counts"),
    "width": (384, "of the hidden state"),
    "num_blocks": (15, "of both stages together"),
    "vocab_size": (8192, "tokens"),
    "seq_length": (128, "tokens of a micro-batch"),
    "token_fraction": (0.125, "interlock.head.token_fraction"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    sizes = {name: getattr(args, name) for name in ("width", "num_blocks", "vocab_size", "seq_length")}
    head = {"type": "norm_linear", "token_fraction": args.token_fraction}
    link = measure_link(4 * args.width * args.seq_length)
    profile = run_ranks(measure_profile, NUM_STAGES, sizes=sizes, head=head, link=link)[0]
    how = {"sizes": sizes, "head": head, "num_batches": dict.fromkeys(args.micro_batches, args.batches)}
    rounds: dict[str, list[dict[int, Any]]] = {name: [] for name in (FLOOR, DEEPSPEED, *args.engines)}
    for turn in range(args.rounds):
        for engine, of_engine in rounds.items():
            print(f"round {turn + 1} of {args.rounds}: {engine} ...", flush=True)
            of_engine.append(run_ranks(measure, NUM_STAGES, engine_name=engine, **how)[0])
    bounds = workload(sizes).bounds(NUM_STAGES)
    rows = []
    for m in args.micro_batches:
        seconds = {engine: _median([times[m] for times in of_engine]) for engine, of_engine in rounds.items()}
        for engine in rounds:
            row = {"engine": engine, "micro_batches": m}
            row |= compare(seconds[engine], seconds[DEEPSPEED], seconds[FLOOR])
            if engine in MODES:
                interlock = InterlockConfig.model_validate({**MODES[engine], "head": head})
                predicted = forecast(interlock, profile, bounds, m).batch_seconds
                row |= {"predicted_seconds": predicted, "of_predicted_speed": predicted / row["seconds"]}
            rows.append(row)
    results.publish("real_stages", args, rows, argv, profile=profile.model_dump())


def _median(seconds: list[Any]) -> Any:
    """Over the rounds; an engine refuses in all of them or in none."""
    return seconds[0] if isinstance(seconds[0], str) else statistics.median(seconds)


# In the processes of a job.


def lm_config(sizes: dict[str, int]) -> LMConfig:
    """The model: 64 entries of the hidden state for every attention head."""
    return LMConfig(**sizes, num_heads=max(1, sizes["width"] // 64))


def workload(sizes: dict[str, int]) -> Workload:
    """The language model on one sequence of random tokens."""
    config = lm_config(sizes)
    torch.manual_seed(0)
    ids_bt = torch.randint(config.vocab_size, (1, config.seq_length + 1))
    # In multiplications of a position; a block also attends, to half of the positions on average.
    block = 12 * config.width**2 + config.seq_length * config.width
    unembedding = config.width * config.vocab_size
    return Workload(
        layers=lm_layers(config),
        layer_seconds=[0, 0, *[block] * config.num_blocks, 0, unembedding],
        loss_fn=lm_loss(),
        micro_batch=(ids_bt[:, :-1].contiguous(), ids_bt[:, 1:].contiguous()),
    )


def measure(
    engine_name: str, sizes: dict[str, int], head: dict[str, Any], num_batches: dict[int, int]
) -> dict[int, float | str]:
    """On every rank of a job: seconds of a batch by number of micro-batches, or why the engine refuses."""
    work = workload(sizes)
    if engine_name == FLOOR:
        net = build_lm(lm_config(sizes))
        return {m: floor_seconds(net, work, m, num) for m, num in num_batches.items()}
    return time_batches(make_peer(engine_name, work, head), work, num_batches)


def measure_profile(sizes: dict[str, int], head: dict[str, Any], link: tuple[float, float] | None) -> Profile:
    """The profile of the model; both ranks measure at once."""
    work = workload(sizes)
    inputs, labels = work.micro_batch
    dist.barrier()
    return profile_model(
        calls_in_sequence(build_lm(lm_config(sizes)), inputs),
        HeadConfig.model_validate(head),
        work.loss_fn,
        labels,
        Stopwatch(lambda: None, num_rounds=7),
        lambda parameters: torch.optim.SGD(parameters, LEARNING_RATE),
        model="language model",
        device=device_name(torch.device("cpu")),
        source="measured on two cores at once",
        link=link,
    )


def floor_seconds(net: nn.Module, work: Workload, num_micro_batches: int, num_batches: int) -> float:
    """Half the seconds in which this process trains the whole model on a batch."""
    inputs, labels = work.micro_batch
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)
    seconds = []
    dist.barrier()
    for _ in range(num_batches + 1):
        start = time.perf_counter()
        for _ in range(num_micro_batches):
            (work.loss_fn(net(inputs), labels) / num_micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / NUM_STAGES


def table(found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    columns = {
        "M": "micro_batches",
        "engine": "engine",
        "s/batch": "seconds",
        "times DeepSpeed": "times_deepspeed",
        "predicted s": "predicted_seconds",
        "% of predicted speed": ("of_predicted_speed", 0.01),
        "times floor": "times_floor",
    }
    note = (
        "Floor: no bubble, no extra work. Empty: torch's 1F1B refuses M below the number of stages. Heads: "
        f"norm_linear, {found['arguments']['vocab_size']} words, "
        f"token_fraction {found['arguments']['token_fraction']}."
    )
    return f"{table_of(found['rows'], columns)}\n\n{note}"


def draw(found: dict[str, Any]) -> Any:
    """Distance to the floor, a group of bars for each number of micro-batches."""
    rows = [row for row in found["rows"] if row["engine"] != FLOOR]
    micro_batches = results.grouped(rows, "micro_batches")
    by_engine = results.grouped(rows, "engine")
    width = 0.8 / len(by_engine)
    figure, ((axis,),) = new_figure(1, "Two Transformer stages on two cores")
    for number, (engine, of_engine) in enumerate(by_engine.items()):
        heights = [row.get("times_floor", 0) for row in of_engine]
        positions = [group - 0.4 + number * width for group in range(len(heights))]
        axis.bar(positions, heights, width, align="edge", label=engine)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(micro_batches)), [f"M = {number}" for number in micro_batches])
    axis.set_ylabel("time of a batch / floor")
    add_legend(figure, axis)
    return figure


if __name__ == "__main__":
    main()
