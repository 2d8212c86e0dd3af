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
from benchmarks.peers import DEEPSPEED, MODES, compare, make_peer, time_batches
from ds_interlock.config import HeadConfig, InterlockConfig
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.planning.forecast import forecast
from ds_interlock.planning.profile import Profile
from ds_interlock.profiling.layers import Stopwatch
from ds_interlock.profiling.link import measure_link
from ds_interlock.profiling.model import calls_in_sequence, device_name, profile_model
from measuring.engines import LEARNING_RATE, Workload, run_ranks
from measuring.torch_pipeline import TORCH_SCHEDULES

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
    # 64 entries of the hidden state for every attention head.
    lm = LMConfig(**sizes, num_heads=max(1, args.width // 64))
    head = {"type": "norm_linear", "token_fraction": args.token_fraction}
    link = measure_link(4 * args.width * args.seq_length)
    profile = run_ranks(measure_profile, NUM_STAGES, lm=lm, head=head, link=link)[0]
    how = {"lm": lm, "head": head, "num_batches": dict.fromkeys(args.micro_batches, args.batches)}
    rounds: dict[str, list[dict[int, Any]]] = {name: [] for name in (FLOOR, DEEPSPEED, *args.engines)}
    for turn in range(args.rounds):
        for engine, of_engine in rounds.items():
            print(f"round {turn + 1} of {args.rounds}: {engine} ...", flush=True)
            of_engine.append(run_ranks(measure, NUM_STAGES, engine_name=engine, **how)[0])
    seconds = {
        engine: {m: _median([times[m] for times in of_engine]) for m in args.micro_batches}
        for engine, of_engine in rounds.items()
    }
    bounds = workload(lm).bounds(NUM_STAGES)

    def predict(engine: str, m: int) -> float:
        interlock = InterlockConfig.model_validate({**MODES[engine], "head": head})
        return forecast(interlock, profile, bounds, m).batch_seconds

    rows = compare(seconds, seconds[FLOOR], predict)
    results.publish("real_stages", args, rows, argv, profile=profile.model_dump())


def _median(seconds: list[Any]) -> Any:
    """Over the rounds; an engine refuses in all of them or in none."""
    return seconds[0] if isinstance(seconds[0], str) else statistics.median(seconds)


def workload(lm: LMConfig) -> Workload:
    """The language model on one sequence of random tokens."""
    torch.manual_seed(0)
    ids_bt = torch.randint(lm.vocab_size, (1, lm.seq_length + 1))
    # In multiplications of a position; a block also attends, to half of the positions on average.
    block = 12 * lm.width**2 + lm.seq_length * lm.width
    return Workload(
        layers=lm_layers(lm),
        layer_seconds=[0, 0, *[block] * lm.num_blocks, 0, lm.width * lm.vocab_size],
        loss_fn=lm_loss(),
        micro_batch=(ids_bt[:, :-1].contiguous(), ids_bt[:, 1:].contiguous()),
    )


def measure(
    engine_name: str, lm: LMConfig, head: dict[str, Any], num_batches: dict[int, int]
) -> dict[int, float | str]:
    """On every rank of a job: seconds of a batch by number of micro-batches, or why the engine refuses."""
    work = workload(lm)
    if engine_name == FLOOR:
        net = build_lm(lm)
        return {m: floor_seconds(net, work, m, num) for m, num in num_batches.items()}
    return time_batches(make_peer(engine_name, work, head), work, num_batches)


def measure_profile(lm: LMConfig, head: dict[str, Any], link: tuple[float, float] | None) -> Profile:
    """The profile of the model; both ranks measure at once."""
    work = workload(lm)
    inputs, labels = work.micro_batch
    dist.barrier()
    return profile_model(
        calls_in_sequence(build_lm(lm), inputs),
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


if __name__ == "__main__":
    main()
