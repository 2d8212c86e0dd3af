"""the job ``finetune`` on tiny models of every family: what goes in comes out, what it says is true."""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from encoded import samples_of
from finetuning import (
    SEQ_LENGTH,
    arguments,
    finetune,
    log_of,
    loss_of,
    rows_of,
    run,
    save_tiny,
    state_of,
    tiny_tokenizer,
)
from huggingface_hub import ModelCard
from ranks import RankError, RankPool
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ds_interlock.hf.data.rows import ClassifiedRows
from ds_interlock.hf.data.samples import encode_classified
from ds_interlock.hf.data.sources import load_records

INTERLOCK = {"mode": "interlock", "window": 2, "timeout_seconds": 60}


# How each family is cut, tests/hf/model/test_cut.py checks; here is one of each kind of export.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt, projected", "mixtral"])
def test_without_a_learning_rate_the_model_comes_out_as_it_went_in(
    family: str, ranks4: RankPool, data: Path, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model")
    section = None if family == "opt, projected" else INTERLOCK  # refused outside global, see below
    metrics = run(ranks4, tmp_path, data, "--learning_rate", 0, section=section)
    before, after = (state_of(folder) for folder in (tmp_path / "model", tmp_path / "out" / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected = loss_of(model, rows_of(data / "valid.jsonl"))
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", dtype=torch.float32)
    assert loss_of(again, rows_of(data / "valid.jsonl")) == pytest.approx(metrics["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_encoders_classify_with_heads_on_the_stages(
    family: str, ranks4: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path / "model", num_labels=2)
    section = {"mode": "local", "timeout_seconds": 60}
    arguments = "--max_steps", 60, "--learning_rate", 2e-3
    metrics = run(ranks4, tmp_path, data, *arguments, section=section, task="classification")
    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    assert metrics["eval_accuracy"] >= 0.8
    assert sum(name.startswith("eval_loss_after_layer") for name in metrics) == 3
    records = load_records(
        [str(data / "train_classes.jsonl")], [str(data / "valid_classes.jsonl")], task="classification"
    )
    samples = samples_of(
        encode_classified(records.validation, tiny_tokenizer(), SEQ_LENGTH, records.label_ids)
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "hf")
    assert model.config.id2label == {0: "cab", 1: "none"}
    assert loss_of(model, ClassifiedRows(samples, SEQ_LENGTH)) == pytest.approx(
        metrics["eval_loss"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("family", "section"),
    [
        ("llama, tied", None),
        ("llama, tied", {"mode": "interlock", "window": 1.5}),
        ("llama, tied", {"mode": "interlock", "window": 2}),
        ("mixtral", {"mode": "local"}),
    ],
    ids=lambda part: str(part and part.get("window", part["mode"])) if not isinstance(part, str) else part,
)
def test_every_mode_trains_and_exports_what_it_evaluated(
    family: str, section: dict[str, Any] | None, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path / "model")
    section = section and {**section, "timeout_seconds": 60}
    flags = ["--output_router_logits"] if family == "mixtral" else []
    metrics = run(ranks2, tmp_path, data, *flags, "--max_steps", 12, "--eval_steps", 6, section=section)
    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", dtype=torch.float32)
    keeps_ties = family != "mixtral" and (section is None or section.get("window") == 2)  # of two: global
    assert model.config.tie_word_embeddings == keeps_ties
    assert loss_of(model, rows_of(data / "valid.jsonl")) == pytest.approx(metrics["eval_loss"], abs=1e-5)
    log = log_of(tmp_path / "out")
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 6, 12]
    assert (tmp_path / "out" / "checkpoints" / "best").is_dir()


def pushed(argv: list[str]) -> tuple[list[str], list[str]]:
    """The job with a hub that accepts everything; returns what was created there, and the files uploaded."""
    api = mock.MagicMock()
    api.create_repo.return_value.repo_id = "me/tuned"
    with mock.patch("ds_interlock.jobs.model_card.HfApi", return_value=api):
        finetune(argv)
    uploads = [call.kwargs["folder_path"] for call in api.upload_folder.call_args_list]
    return [call.args[0] for call in api.create_repo.call_args_list], [
        path.name for folder in uploads for path in sorted(folder.iterdir())
    ]


def test_weights_kept_in_step_are_exported_tied_with_a_card(
    ranks4: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama, tied", tmp_path / "model")
    section = {**INTERLOCK, "tied_weights": "sync"}
    more = "--max_steps", 3, "--push_to_hub", "--hub_model_id", "me/tuned"
    answers = ranks4.run(pushed, argv=arguments(tmp_path, data, *more, section=section))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (names, files), *of_others = answers
    assert (names, of_others) == (["me/tuned"], [([], [])] * 3)
    assert {"README.md", "run.json", "config.json", "model.safetensors"} <= set(files)
    card = ModelCard.load(tmp_path / "out" / "hf" / "README.md")
    assert card.data.tags == ["ds_interlock"]
    assert f"| eval_loss | {metrics['eval_loss']:.4f} |" in card.text
    manifest = json.loads((tmp_path / "out" / "hf" / "run.json").read_text())
    assert manifest["versions"]["torch"] == version("torch")
    assert manifest["arguments"]["seed"] == metrics["seed"]
    assert manifest["deepspeed_config"]["interlock"] == section
    assert manifest["data"]["training"]["samples"] == len(rows_of(data / "train.jsonl").samples)
    assert manifest["metrics"]["eval_loss"] == metrics["eval_loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", dtype=torch.float32)
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in state_of(tmp_path / "out" / "hf")
    assert loss_of(model, rows_of(data / "valid.jsonl")) == pytest.approx(metrics["eval_loss"], abs=1e-5)


@pytest.mark.bad_input
def test_tied_weights_can_be_refused(ranks4: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "model")
    with pytest.raises(RankError, match=r'interlock\.tied_weights is "error"'):
        run(ranks4, tmp_path, data, section={**INTERLOCK, "tied_weights": "error"})
