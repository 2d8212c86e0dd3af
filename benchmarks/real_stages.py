"""Two stages of a real Transformer on two cores: this package's modes beside DeepSpeed's engine and torch's.

    python -m benchmarks.real_stages --output real_stages.json

Nothing sleeps. A language model (``ds_interlock/models/lm.py``) is cut into two stages of about the same
work; each runs in a process of its own with one thread, in float32 on gloo, with SGD. Auxiliary heads are
``norm_linear`` over the whole vocabulary, on ``--token_fraction`` of the positions. For each engine and
number of micro-batches M: the seconds a batch takes, how many times faster than DeepSpeed's engine that
is, what ``ds-interlock plan`` predicts from the profile of these layers, and the distance to the floor:
half the time in which a process trains the whole model on the same batch without any pipeline. Profile
and floor are measured while a second process does the same, so that both cores are busy, as they are
under a pipeline without a bubble.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import results
from benchmarks.peers import DEEPSPEED, MODES, TORCH_SCHEDULES, make_peer
from ds_interlock.config import HeadConfig, InterlockConfig
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.planning.forecast import forecast
from ds_interlock.planning.profile import Profile
from ds_interlock.profiling.layers import Stopwatch
from ds_interlock.profiling.link import measure_link
from ds_interlock.profiling.model import calls_in_sequence, device_name, profile_model
from measuring.engines import LEARNING_RATE, Workload, seconds_of_a_batch
from measuring.ranks import run_ranks
from measuring.results import add_legend, new_figure, table_of

NUM_STAGES = 2
FLOOR = "floor"
ENGINES = (
    *TORCH_SCHEDULES,
    *(name for name in MODES if name != "window 2"),
)  # of two stages window 2 is global


OPTIONS: results.Options = {
    "engines": (list(ENGINES), "measured beside DeepSpeed's", ENGINES),
    "micro_batches": ([1, 2, 4], "of a batch"),
    "batches": (5, "timed, after two that are not"),
    "rounds": (3, "of all engines; the median counts"),
    "width": (384, "of the hidden state"),
    "num_blocks": (15, "of both stages together"),
    "vocab_size": (8192, "tokens"),
    "seq_length": (128, "tokens of a micro-batch"),
    "token_fraction": (0.125, "interlock.head.token_fraction"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and returns the results."""
    args = results.parse(__doc__, OPTIONS, argv)
    sizes = {name: getattr(args, name) for name in ("width", "num_blocks", "vocab_size", "seq_length")}
    how = {"sizes": sizes, "micro_batches": args.micro_batches, "num_batches": args.batches}
    head = {"type": "norm_linear", "token_fraction": args.token_fraction}
    link = measure_link(4 * args.width * args.seq_length)
    profile = Profile.model_validate_json(
        run_ranks(measure_profile, NUM_STAGES, sizes=sizes, head=head, link=link)[0]
    )
    rounds: dict[str, list[list[float | None]]] = {name: [] for name in (FLOOR, DEEPSPEED, *args.engines)}
    for turn in range(args.rounds):
        for engine, of_engine in rounds.items():
            print(f"round {turn + 1} of {args.rounds}: {engine} ...", flush=True)
            if engine == FLOOR:
                ranks = run_ranks(measure_floor, NUM_STAGES, **how)
            else:
                ranks = run_ranks(measure, NUM_STAGES, engine_name=engine, head=head, **how)
            of_engine.append(ranks[0])
    seconds = {engine: _medians(of_engine) for engine, of_engine in rounds.items()}
    rows = [
        {"engine": engine, "micro_batches": m, **_figures(seconds, engine, number)}
        for number, m in enumerate(args.micro_batches)
        for engine in seconds
    ]
    bounds = workload(sizes).bounds(NUM_STAGES)
    for row in rows:
        if row["engine"] in MODES and "seconds" in row:
            interlock = InterlockConfig.model_validate({**MODES[row["engine"]], "head": head})
            predicted = forecast(interlock, profile, bounds, row["micro_batches"]).batch_seconds
            row |= {"predicted_seconds": predicted, "of_predicted_speed": predicted / row["seconds"]}
    return results.publish("real_stages", args, rows, argv, profile=profile.model_dump())


def _medians(rounds: list[list[float | None]]) -> list[float | None]:
    """Of every figure over the rounds; an engine refuses in all of them or in none."""
    return [
        None if None in figures else statistics.median(filter(None, figures))
        for figures in zip(*rounds, strict=True)
    ]


def _figures(all_seconds: dict[str, list[float | None]], engine: str, number: int) -> dict[str, float]:
    seconds, floor, deepspeed = (all_seconds[name][number] for name in (engine, FLOOR, DEEPSPEED))
    if seconds is None:
        return {}
    assert floor is not None
    assert deepspeed is not None
    return {"seconds": seconds, "times_deepspeed": deepspeed / seconds, "times_floor": seconds / floor}


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
    engine_name: str, sizes: dict[str, int], micro_batches: list[int], num_batches: int, head: dict[str, Any]
) -> list[float | None]:
    """On every rank of a job: seconds of a batch, by number of micro-batches; None if the engine refuses."""
    work = workload(sizes)
    engine = make_peer(engine_name, work, head)
    found: list[float | None] = []
    for num_micro_batches in micro_batches:
        try:
            found.append(seconds_of_a_batch(engine, work, num_micro_batches, num_batches))
        except ValueError:  # torch's 1F1B, of fewer micro-batches than stages
            found.append(None)
    return found


def measure_profile(sizes: dict[str, int], head: dict[str, Any], link: tuple[float, float] | None) -> str:
    """The profile of the model, as JSON; both ranks measure at once."""
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
    ).model_dump_json()


def measure_floor(sizes: dict[str, int], micro_batches: list[int], num_batches: int) -> list[float]:
    """The floor: half the seconds in which this process trains the whole model on a batch."""
    work = workload(sizes)
    inputs, labels = work.micro_batch
    net = build_lm(lm_config(sizes))
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)
    found = []
    for num_micro_batches in micro_batches:
        seconds = []
        dist.barrier()
        for _ in range(num_batches + 1):
            start = time.perf_counter()
            for _ in range(num_micro_batches):
                (work.loss_fn(net(inputs), labels) / num_micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
        found.append(statistics.median(seconds[1:]) / NUM_STAGES)
    return found


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
    micro_batches = sorted({row["micro_batches"] for row in rows})
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure, ((axis,),) = new_figure(1, "Two Transformer stages on two cores")
    for number, engine in enumerate(engines):
        heights = [row.get("times_floor", 0) for row in rows if row["engine"] == engine]
        places = [group + (number - len(engines) / 2) * 0.8 / len(engines) for group in range(len(heights))]
        axis.bar(places, heights, 0.8 / len(engines), align="edge", label=engine)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(micro_batches)), [f"M = {number}" for number in micro_batches])
    axis.set_ylabel("time of a batch / floor")
    add_legend(figure, axis)
    return figure


if __name__ == "__main__":
    main()
