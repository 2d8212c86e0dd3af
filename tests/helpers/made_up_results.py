"""Results of an experiment that nobody ran, small enough to work out by hand."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds_interlock.errors import DataError
from experiments.batch_times import BatchTimes, ProfileOfStages, Row
from experiments.comparison import Comparison, Result
from experiments.definition import Run

SECTIONS: dict[str, dict[str, Any]] = {
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    "window 2": {"mode": "interlock", "window": 2},
}
#: Losses after 50, 100, ... steps, by mode and seed. Window 2 is at global's loss after 125 and 120 steps.
LOSSES: dict[str, dict[int, list[float]]] = {
    "global": {0: [3.0, 2.0], 1: [3.1, 2.1]},
    "local": {0: [3.2, 2.6], 1: [3.3, 2.5]},
    "window 2": {0: [3.0, 2.2, 1.8], 1: [3.1, 2.14, 2.04]},
}
#: Seconds of a batch by M.
SECONDS = {"global": {1: 8.0, 4: 4.0}, "local": {1: 1.0, 4: 1.0}, "window 2": {1: 2.0, 4: 3.2}}


def record(
    mode: str,
    seed: int,
    losses: list[float],
    *,
    section: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    error: float | None = None,
    budget: int = 100,
    device: str = "cpu",
    cosine: list[float | None] | None = None,
) -> dict[str, Any]:
    """A line of a results file; the RMS after stage 0 is 1 for global, 3 + seed for others."""
    first_rms = 1.0 if mode == "global" else 3.0 + seed
    point = {"train_loss": 9.0, "stage_rms": [first_rms, 2.0], **({"cosine": cosine} if cosine else {})}
    final = {"loss": losses[1], **({} if error is None else {"error": error})}
    return {
        "run": {
            "experiment": "tiny",
            "mode": mode,
            "seed": seed,
            "num_stages": 3,
            "model": model or {"kind": "prose", "num_blocks": 3},
            "training": {
                "num_steps": budget,
                "micro_batch_size": 16,
                "num_micro_batches": 2,
                "optimizer": "adamw",
                "learning_rate": 2e-3,
                "warmup_steps": 10,
            },
            "measurements": {"evaluate_every": 50, "num_samples": 8, "num_final_samples": 16},
            "interlock": section or SECTIONS[mode],
            "num_steps": 50 * len(losses),
        },
        "final": final,
        "curve": [{"step": 50 * n, "loss": loss, **point} for n, loss in enumerate(losses, start=1)],
        "seconds": 90.0,
        "ended": "2026-01-01T00:00:00+00:00",
        "device": device,
        "machine": {
            "processor": "Abacus 9",
            "num_cores": 2,
            "memory_bytes": 3 * 2**30,
            "system": "Linux x",
            "gpu": None if device == "cpu" else "GPU 7",
        },
        "versions": {"python": "3.99", "torch": "9.9"},
    }


def records() -> list[dict[str, Any]]:
    """Of all modes and seeds."""
    return [record(mode, seed, losses) for mode, of in LOSSES.items() for seed, losses in of.items()]


def compared(lines: Iterable[dict[str, Any]]) -> Comparison:
    """A comparison without a file."""
    results: dict[str, dict[int, Result]] = {}
    for line in lines:
        run = Run.model_validate(line["run"])
        results.setdefault(run.mode, {})[run.seed] = Result(run, line)
    return Comparison("tiny", results)


def write_batch_times(path: Path, modes: Iterable[str] = tuple(SECONDS)) -> None:
    rows = [
        Row(
            mode=mode,
            phase=None,
            interlock=SECTIONS[mode],
            micro_batches=m,
            seconds=seconds,
            relative_seconds=seconds,
            predicted=seconds,
        )
        for mode in modes
        for m, seconds in SECONDS[mode].items()
    ]
    profile = ProfileOfStages(stage_bounds=(0, 2, 4, 6), stages=(), unit_seconds=1.0)
    times = BatchTimes(
        experiment="tiny", milliseconds=1, command="", machine={}, versions={}, profile=profile, rows=rows
    )
    path.write_text(times.model_dump_json())


def mode_of(section: Any) -> str:
    for mode, found in SECTIONS.items():
        if found == dict(section):
            return mode
    raise DataError("not timed")
