"""Checkpoints of the job ``finetune``: to resume from, to export from, and the best one."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from finetuning import (
    LOCAL,
    arguments,
    finetune,
    log_of,
    loss_of,
    rows_of,
    run,
    save_tiny,
    state_of,
    write_lines,
)
from ranks import RankPool
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from ds_interlock.cli import main as cli

DRAFTABLE = {**LOCAL, "head": {"type": "lens", "translator": "after_norm"}}


def causal(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def evaluated(output: Path) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in log_of(output) if "eval_loss" in entry}


def reported(output: Path) -> list[tuple[int, float | None, float | None]]:
    """Of each line what does not depend on when it is written: losses of the stages arrive late."""
    return [(line["step"], line.get("learning_rate"), line.get("eval_loss")) for line in log_of(output)]


def recomputations(argv: list[str]) -> int:
    """The job; returns how often activations were not kept."""
    with mock.patch("ds_interlock.stage.recomputation.checkpoint", wraps=checkpoint) as spy:
        finetune(argv)
    return spy.call_count


def test_a_resumed_run_ends_as_an_undisturbed_one(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": "auto"}}}
    how: dict[str, Any] = {"section": LOCAL, "config": schedule}
    steps = "--logging_steps", 1, "--eval_steps", 2, "--max_steps", 7, "--lora_dropout", 0.2, "--lora_r", 2
    whole = run(ranks2, tmp_path, data, *steps, **how, out="whole")
    # It was saved after 4 steps, and again after 5, of which not all is left.
    resume = "--resume_from_checkpoint", "auto"
    run(ranks2, tmp_path, data, *steps, "--save_steps", 4, "--max_steps", 5, *resume, **how)
    os.truncate(tmp_path / "out" / "checkpoints" / "global_step5" / "layer_00-model_states.pt", 99)
    # That activations are recomputed from there on changes no number.
    argv = arguments(tmp_path, data, *steps, *resume, "--gradient_checkpointing", **how)
    assert all(ranks2.run(recomputations, argv=argv))
    resumed = json.loads((tmp_path / "out" / "metrics.json").read_text())
    ours, theirs = (state_of(tmp_path / out / "adapter") for out in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    of_the_machine = {"seconds", "peak_memory_bytes"}
    assert resumed.keys() == whole.keys()
    assert all(resumed[name] == whole[name] for name in whole.keys() - of_the_machine)
    assert reported(tmp_path / "out") == reported(tmp_path / "whole")


def test_another_folder_goes_on_from_one_checkpoint(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("llama, tied", tmp_path / "model")
    run(ranks2, tmp_path, data, "--save_steps", 2, "--max_steps", 5, "--save_total_limit", 2)
    names = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert names == {"global_step4", "global_step5", "hf", "latest"}
    resume = "--resume_from_checkpoint", tmp_path / "out" / "checkpoints" / "global_step4"
    run(ranks2, tmp_path, data, "--max_steps", 5, *resume, out="other")
    ours, theirs = (state_of(tmp_path / out / "hf") for out in ("other", "out"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_best_checkpoint_is_exported_even_if_a_resumed_run_gets_worse(
    ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    other = write_lines(tmp_path / "other.jsonl", [{"text": "zy xw vu ts"}, {"text": "wx yz"}])
    # The better it knows the training data, the less it expects this.
    steps = "--validation_file", other, "--eval_steps", 5, "--load_best_model_at_end", "--learning_rate", 2e-2
    run(ranks2, tmp_path, data, *steps, "--max_steps", 20)
    resume = "--resume_from_checkpoint", tmp_path / "out" / "checkpoints"
    run(ranks2, tmp_path, data, *steps, "--max_steps", 30, *resume)
    losses = evaluated(tmp_path / "out")
    assert sorted(losses) == [0, 5, 10, 15, 20, 25, 30]
    best = min(loss for step, loss in losses.items() if step)
    assert losses[25] > best < losses[30]
    model = causal(tmp_path / "out" / "hf")
    assert loss_of(model, rows_of(other)) == pytest.approx(best, abs=1e-5)
    about = json.loads((tmp_path / "out" / "hf" / "run.json").read_text())["metrics"]
    assert (about["eval_loss"], losses[about["steps"]]) == (best, best)


def test_a_run_stops_when_its_validation_loss_no_longer_falls(
    ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    other = write_lines(tmp_path / "other.jsonl", [{"text": "zy xw vu ts"}, {"text": "wx yz"}])
    more = "--validation_file", other, "--eval_steps", 2, "--learning_rate", 2e-2, "--max_steps", 60
    stops = "--early_stopping_patience", 3, "--no_eval_on_start", "--load_best_model_at_end"
    metrics = run(ranks2, tmp_path, data, *more, *stops, "--save_steps", 2)
    losses = evaluated(tmp_path / "out")
    steps = sorted(losses)
    assert steps == list(range(2, metrics["steps"] + 1, 2))
    assert metrics["steps"] < 60
    assert min(losses, key=losses.__getitem__) == steps[-4]
    assert metrics["best_eval_loss"] == losses[steps[-4]] < metrics["eval_loss"]
    assert loss_of(causal(tmp_path / "out" / "hf"), rows_of(other)) == pytest.approx(
        metrics["best_eval_loss"], abs=1e-5
    )
    # It has stopped for good, and a resumed run counts on from the log.
    resume = "--resume_from_checkpoint", tmp_path / "out" / "checkpoints" / f"global_step{steps[-2]}"
    assert run(ranks2, tmp_path, data, *more, *stops, *resume)["steps"] == metrics["steps"]


def test_tensorboard_has_every_evaluation(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    more = "--report_to", "tensorboard", "--eval_steps", 2, "--max_steps", 4
    metrics = run(ranks2, tmp_path, data, *more, section=LOCAL)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    for name in ("eval_loss", "eval_perplexity", "eval_loss_after_layer_3"):
        values = [event.value for event in events.Scalars(f"Eval/{name}")]
        logged = [entry[name] for entry in log_of(tmp_path / "out") if name in entry]
        assert values == pytest.approx(logged, rel=1e-6)
        assert len(values) == 3
        assert logged[-1] == metrics[name]
    assert any(tag.startswith("Train/") for tag in events.Tags()["scalars"])


@pytest.mark.parametrize("family", ["llama, tied", "gpt2"])
def test_a_checkpoint_becomes_a_model_and_a_draft(
    family: str, ranks4: RankPool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(family, tmp_path / "model")
    more = "--max_steps", 6, "--export_heads"
    metrics = run(ranks4, tmp_path, data, *more, section=DRAFTABLE)
    heads = {name for name in metrics if name.startswith("eval_loss_after_layer_")}
    stored = state_of(tmp_path / "out" / "hf")
    assert {name.split(".")[1] for name in stored if name.startswith("heads.")} == {"0", "1", "2"}
    checkpoint = tmp_path / "out" / "checkpoints" / "global_step6"
    rows = rows_of(data / "valid.jsonl")

    assert cli(["export", str(checkpoint), str(tmp_path / "whole")]) == 0
    assert loss_of(causal(tmp_path / "whole"), rows) == pytest.approx(metrics["eval_loss"], abs=1e-5)
    assert cli(["export", str(checkpoint), str(tmp_path / "draft"), "--stages", "2", "--head", "1"]) == 0
    draft = causal(tmp_path / "draft")
    at = [int(name.rpartition("_")[2]) for name in heads]
    loss = metrics[f"eval_loss_after_layer_{sorted(at)[1]}"]
    assert loss_of(draft, rows) == pytest.approx(loss, abs=1e-5)
    assert draft.config.num_hidden_layers < 4
    capsys.readouterr()


def test_bf16(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    more = "--max_steps", 8, "--learning_rate", 5e-3
    metrics = run(ranks2, tmp_path, data, *more, section=LOCAL, config={"bf16": {"enabled": True}})
    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    model = causal(tmp_path / "out" / "hf")
    assert model.dtype == torch.bfloat16
    assert loss_of(model, rows_of(data / "valid.jsonl")) == pytest.approx(metrics["eval_loss"], abs=2e-2)
