"""The engines that are compared, by name: DeepSpeed's, this package's modes, and torch's schedules.

Each has DeepSpeed's ``train_batch(data_iter)`` and ``set_train_batch_size(num_samples)``. All train with
plain SGD and step once per batch.
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from measuring.engines import Workload, make_engine, seconds_of_a_batch
from measuring.torch_pipeline import TORCH_SCHEDULES, TorchPipeline

DEEPSPEED = "DeepSpeed"
MODES: dict[str, dict[str, Any]] = {
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    "window 1.25": {"mode": "interlock", "window": 1.25},
    "window 1.25, 1 extra": {"mode": "interlock", "window": 1.25, "extra_in_flight": 1},
    "window 1.5": {"mode": "interlock", "window": 1.5},
    "window 2": {"mode": "interlock", "window": 2},
}


def make_peer(name: str, work: Workload, head: dict[str, Any] | None = None) -> Any:
    """The engine called ``name``, on this rank; ``head`` is the section ``"interlock.head"`` of a mode."""
    if name in TORCH_SCHEDULES:
        return TorchPipeline(name, work)
    return make_engine(work, None if name == DEEPSPEED else MODES[name] | ({"head": head} if head else {}))


def time_batches(engine: Any, work: Workload, num_batches: dict[int, int]) -> dict[int, float | str]:
    """Seconds of a batch, or why the engine refuses it, by number of micro-batches. All ranks call it."""
    seconds: dict[int, float | str] = {}
    for num_micro_batches, num in num_batches.items():
        try:
            seconds[num_micro_batches] = seconds_of_a_batch(engine, work, num_micro_batches, num)
        except ValueError as error:
            seconds[num_micro_batches] = " ".join(str(error).split())
    return seconds


def compare(
    seconds: Mapping[str, Mapping[int, float | str]],
    floor: Mapping[int, float],
    predict: Callable[[str, int], float],
) -> list[dict[str, Any]]:
    """Rows for each number of micro-batches M and engine: its time beside DeepSpeed's and the floor.

    Args:
        seconds: By engine and M, what ``time_batches`` returns.
        floor: By M, seconds of a batch without a bubble and without extra work.
        predict: From one of our modes and M to the seconds that a batch should take.
    """
    rows = []
    for m, engine in product(floor, seconds):
        taken, row = seconds[engine][m], {"micro_batches": m, "engine": engine}
        if isinstance(taken, str):
            rows.append(row | {"refused": taken})
            continue
        row |= {
            "seconds": taken,
            "times_deepspeed": seconds[DEEPSPEED][m] / taken,
            "times_floor": taken / floor[m],
        }
        if engine in MODES:
            predicted = predict(engine, m)
            row |= {"predicted_seconds": predicted, "share_of_predicted_speed": predicted / taken}
        rows.append(row)
    return rows
