"""One short version of everything: each experiment with all its modes, batch times, report.

    python -m experiments.run smoke

Models are a few channels wide and learn for a few steps, so nothing here is a result; it shows that the
whole chain runs on this machine, with its data. What comes out is in runs/smoke.
"""

import shutil
from pathlib import Path
from typing import Any

from experiments import definition
from experiments.definition import Definition

FOLDER = Path("runs/smoke")
NUM_STAGES = 4
NUM_STEPS = 4
NUM_SEEDS = 2

_MODELS: dict[str, dict[str, Any]] = {
    "prose": {"seq_length": 16, "width": 16, "num_blocks": NUM_STAGES},
    "images": {"width": 2, "num_train_images": 256},
}


def shrunk(whole: Definition) -> Definition:
    """The same modes on a tiny model for a few steps: what ``definition.load`` gives for "smoke-NAME"."""
    training = whole.training.model_copy(
        update={"num_steps": NUM_STEPS, "micro_batch_size": 4, "warmup_steps": 1}
    )
    measurements = whole.measurements.model_copy(
        update={"evaluate_every": 2, "num_samples": 16, "num_final_samples": 32, "evaluation_batch_size": 32}
    )
    modes = {
        name: mode.model_copy(update={"interlock": _shrunk_section(mode.interlock), "num_steps": None})
        for name, mode in whole.modes.items()
    }
    return whole.model_copy(
        update={
            "num_stages": NUM_STAGES,
            "seeds": whole.seeds[:NUM_SEEDS],
            "model": whole.model.model_copy(update=_MODELS[whole.model.kind]),
            "training": training,
            "measurements": measurements,
            "modes": modes,
        }
    )


def main() -> int:
    """Runs, times and reports every shrunk experiment; the exit status."""
    from experiments import batch_times, report, run  # they read definitions, shrunk ones too

    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in map(definition.smoke_name, definition.names()):
        status = run.main([name, "--output", str(FOLDER / f"{name}.jsonl")])
        status = status or batch_times.main(
            [
                name,
                "--micro_batches",
                "2",
                "--milliseconds",
                "2",
                "--output",
                str(FOLDER / f"{name}_batch_times.json"),
            ]
        )
        if status:
            return status
    return report.main(["--results", str(FOLDER), "--output", str(FOLDER / "results.md")])


def _shrunk_section(section: dict[str, Any]) -> dict[str, Any]:
    """The phases of a schedule follow each other step by step."""
    if "schedule" not in section:
        return section
    phases = [{**phase, "from_step": number} for number, phase in enumerate(section["schedule"])]
    return {**section, "schedule": phases}
