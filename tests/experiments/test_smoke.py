"""Short versions of the experiments, from their data to the report."""

from pathlib import Path
from typing import Any

import pytest

from experiments import batch_times, definition, report, run, stage_profile
from experiments.definition import Definition
from experiments.stage_profile import Pipeline
from experiments.training import Training

FEW_MODES = ("global", "local", "window 2")
NUM_STAGES = 4
SMALL: dict[str, dict[str, Any]] = {
    "prose": {"seq_length": 16, "width": 16, "num_blocks": NUM_STAGES, "num_heads": 2, "vocab_size": None},
    "images": {"width": 2, "num_train_images": 256},
    "training": {"num_steps": 4, "micro_batch_size": 4, "warmup_steps": 1},
    "measurements": {"evaluate_every": 2, "num_samples": 16, "num_final_samples": 32},
}


def shrunk(whole: Definition) -> Definition:
    """The same modes on a tiny model for a few steps; the phases of a schedule follow step by step."""
    modes = {}
    for name, mode in whole.modes.items():
        section = dict(mode.interlock)
        if "schedule" in section:
            section["schedule"] = [{**p, "from_step": n} for n, p in enumerate(section["schedule"])]
        modes[name] = mode.model_copy(update={"interlock": section, "num_steps": None})
    return whole.model_copy(
        update={
            "num_stages": NUM_STAGES,
            "model": whole.model.model_copy(update=SMALL[whole.model.kind]),
            "training": whole.training.model_copy(update=SMALL["training"]),
            "measurements": whole.measurements.model_copy(update=SMALL["measurements"]),
            "modes": modes,
        }
    )


def predicted_seconds(pipeline: Pipeline, micro_batches: list[int], unit_seconds: float) -> dict[int, float]:
    return {num: unit_seconds * pipeline.predicted(num) for num in micro_batches}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinks the definitions to the modes of the summary and one seed; times layers twice only.

    Pipelines are not started: test_batch_times.py does.
    """
    monkeypatch.setattr(stage_profile, "NUM_ROUNDS", 2)
    monkeypatch.setattr(Pipeline, "seconds", predicted_seconds)
    whole = definition.load

    def load(name: str) -> Definition:
        loaded = shrunk(whole(name))
        modes = {mode: loaded.modes[mode] for mode in FEW_MODES}
        return loaded.model_copy(update={"modes": modes, "seeds": loaded.seeds[:1]})

    monkeypatch.setattr(definition, "load", load)


def test_the_whole_chain_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: None) -> None:
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "checkpoints")
    names = ("transformer", "resnet_convolutions")
    for name in names:
        times = str(tmp_path / f"{name}_batch_times.json")
        assert run.main([name, "--output", str(tmp_path / f"{name}.jsonl")]) == 0
        assert batch_times.main([name, "--micro_batches", "2", "--milliseconds", "2", "--output", times]) == 0
    assert report.main(["--results", str(tmp_path), "--output", str(tmp_path / "results.md")]) == 0
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    for name in names:
        loaded = definition.load(name)
        section = page.split(f"## {loaded.title}")[1].split("\n## ")[0]
        assert all(f"| {mode} |" in section for mode in loaded.modes)
        assert "Not run yet" not in section
        assert (tmp_path / "results" / f"{name}_curves.svg").stat().st_size > 0


@pytest.mark.parametrize("name", definition.names())
def test_models_and_plans_of_all_modes_build(name: str) -> None:
    runs = shrunk(definition.load(name)).runs(name)
    for of_mode in {one.mode: one for one in runs}.values():
        training = Training(of_mode, "cpu")
        assert training.net.plan.num_stages == of_mode.num_stages
