"""The job ``finetune`` with heads that learn from the base model: what it makes of the training data."""

import csv
import math
import re
import shutil
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from families import save_tiny
from finetuning import LOCAL, SEQ_LENGTH, arguments, finetune, refusal, rows_of, run, state_of
from ranks import RankPool

from ds_interlock.hf.data.batches import BatchShape, TrainingBatches
from ds_interlock.hf.data.rows import PackedRows, PaddedRows, Rows
from ds_interlock.stage.work import StageWork

KL_ONLY = {**LOCAL, "head": {"objective": "kl", "warmup_steps": 0}}
SEED = 42  # what the job has if none is given


def monitored(folder: Path) -> dict[str, Any]:
    """A config whose monitor keeps the losses of every batch."""
    return {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "csv"}}


def head_losses(folder: Path) -> list[float]:
    """Those of the only head, batch by batch."""
    (path,) = (folder / "csv").glob("Train_stage_*_loss_after_layer_*.csv")
    with path.open(newline="") as file:
        # Every run begins with a line of titles.
        return [float(value) for samples, value in csv.reader(file) if samples != "step"]


@torch.no_grad()
def divergence_of_the_first_batch(model: Any, rows: Rows, after_layer: int) -> float:
    """KL divergence of the model cut after some layers from the whole model: the mean over the labels."""
    total, num_labels = 0.0, 0
    for inputs, (labels_bt, _) in islice(TrainingBatches(rows, BatchShape(2, 2), seed=SEED), 2):
        for ids_t, other_t, labels_t in zip(*inputs, labels_bt, strict=True):
            # Behind its last token a sample may be padded: a causal model does not look there.
            starts = (other_t == 0).nonzero().flatten().tolist() if "position_ids" in rows.names else [0]
            for start, stop in zip(starts, [*starts[1:], len(ids_t)], strict=True):
                outputs = model(ids_t[None, start:stop], output_hidden_states=True)
                hidden_1td = outputs.hidden_states[after_layer - 1]  # the first is what layer 0 makes
                labelled = labels_t[None, start:stop] != -100
                head_1tv = model.lm_head(model.model.norm(hidden_1td))
                if cap := getattr(model.config, "final_logit_softcapping", None):
                    head_1tv = cap * torch.tanh(head_1tv / cap)
                log_p, log_q = (logits[labelled].log_softmax(-1) for logits in (outputs.logits, head_1tv))
                total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
                num_labels += int(labelled.sum())
    return total / num_labels


@pytest.mark.parametrize(("family", "kind"), [("llama, tied", PaddedRows), ("gemma2", PackedRows)])
def test_the_first_divergence_is_that_of_the_model_from_itself(
    family: str, kind: type[Rows], ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model")
    options = ["--max_steps", 12, "--learning_rate", 2e-3, *["--packing"] * (kind is PackedRows)]
    metrics = run(ranks2, tmp_path, data, *options, section=KL_ONLY, config=monitored(tmp_path))
    (after_layer,) = (int(name.rpartition("_")[2]) for name in metrics if name.startswith("eval_loss_after"))
    losses = head_losses(tmp_path)
    rows = kind(rows_of(data / "train.jsonl").samples, SEQ_LENGTH)
    expected = divergence_of_the_first_batch(model, rows, after_layer)
    assert len(losses) == 12
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    assert metrics["eval_loss"] < metrics["first_eval_loss"]


def test_reconstruction_keeps_the_first_stage_while_the_last_one_learns(
    ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    """Adam would make whole steps of rounding errors; of a window, what the last stage moves comes back."""
    save_tiny("llama", tmp_path / "model")
    before = state_of(tmp_path / "model")
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0, "torch_adam": True}}}
    head = {"objective": "reconstruction", "warmup_steps": 2}
    for section in (LOCAL, {**LOCAL, "mode": "interlock", "window": 1.5}):
        config = {**adam, **monitored(tmp_path)}
        metrics = run(ranks2, tmp_path, data, section={**section, "head": head}, config=config)
        after = state_of(tmp_path / "out" / "hf")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        if section is LOCAL:
            (first,) = [name for name in metrics if name.startswith("first_eval_loss_after_layer")]
            assert head_losses(tmp_path) == [0, 0]
            assert moved == {
                name for name in before if re.match(r"model\.layers\.[2-9]|model\.norm|lm_head", name)
            }
            assert metrics["eval_loss"] < metrics["first_eval_loss"]
            assert metrics[first.removeprefix("first_")] < metrics[first], "the warm-up fits its translator"
    assert moved == before.keys()


def test_bf16_with_adapters_and_fitted_heads(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    model = save_tiny("gemma2", tmp_path / "model")
    head = {"objective": {"cross_entropy": 1, "kl": 0.5}, "warmup_steps": 2, "token_fraction": 0.5}
    section = {**LOCAL, "mode": "interlock", "window": 1.5, "head": head}
    config = {"bf16": {"enabled": True}, **monitored(tmp_path)}
    metrics = run(
        ranks2, tmp_path, data, "--max_steps", 3, "--packing", "--lora_r", 2, section=section, config=config
    )
    assert math.isfinite(metrics["train_loss"])
    num_tokens = sum(len(sample.ids) for sample in rows_of(data / "train.jsonl").samples)
    states_bytes = num_tokens * model.config.hidden_size * 2
    (file,) = (tmp_path / "out" / "base_states").iterdir()
    assert states_bytes < file.stat().st_size < states_bytes + 1000, "no padding is kept"


def test_a_resumed_run_goes_on_with_the_states_of_the_first(
    ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    states = tmp_path / "out" / "base_states"
    config = monitored(tmp_path)
    head = {"objective": {"kl": 1, "reconstruction": 2}, "warmup_steps": 0}
    section = {**LOCAL, "mode": "interlock", "window": 1.5, "head": head}
    run(ranks2, tmp_path, data, "--max_steps", 4, section=section, config=config)
    undisturbed = head_losses(tmp_path)
    shutil.rmtree(tmp_path / "csv")

    run(ranks2, tmp_path, data, "--max_steps", 2, section=section, config=config)
    files = {path: path.stat().st_mtime_ns for path in states.iterdir()}
    assert len(files) == 2
    resumed = "--max_steps", 4, "--resume_from_checkpoint", tmp_path / "out" / "checkpoints"
    run(ranks2, tmp_path, data, *resumed, section=section, config=config)
    assert all(path.stat().st_mtime_ns == written_ns for path, written_ns in files.items())
    assert head_losses(tmp_path) == undisturbed

    resumed = "--max_steps", 5, *resumed[2:]
    states.rename(tmp_path / "elsewhere")
    message = refusal(ranks2, arguments(tmp_path, data, *resumed, section=section))
    assert "replica_00.safetensors is missing" in message
    (tmp_path / "elsewhere").rename(states)
    save_tiny("llama", tmp_path / "model", seed=1)
    message = refusal(ranks2, arguments(tmp_path, data, *resumed, section=section))
    assert "replica_00.safetensors was written for another model: " in message


def test_states_are_kept_only_where_heads_learn_from_them(
    ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    without_heads = {**KL_ONLY, "mode": "interlock", "window": 2}  # of two stages: global
    for section in (without_heads, LOCAL):
        run(ranks2, tmp_path, data, section=section)
        assert not (tmp_path / "out" / "base_states").exists()
    save_tiny("bert", tmp_path / "model", num_labels=2)
    message = refusal(ranks2, arguments(tmp_path, data, section=KL_ONLY, task="classification"))
    assert 'interlock.head.objective is "kl": the heads of a classifier learn from the labels' in message


def parts_of_labels(argv: list[str]) -> set[int]:
    """The job; returns how many parts the labels have that this rank trains with."""
    feed, seen = StageWork.feed, set()

    def note(work: StageWork, micro_batch: int, inputs: Any, labels: Any) -> None:
        if torch.is_grad_enabled():
            seen.add(len(labels))
        feed(work, micro_batch, inputs, labels)

    # The check at load trains on a batch of its own.
    with mock.patch.object(StageWork, "feed", note), mock.patch("ds_interlock.jobs.finetune.check_layers"):
        finetune(argv)
    return seen


def test_states_travel_as_far_as_the_last_head(ranks4: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    section = {**KL_ONLY, "mode": "interlock", "window": 3}  # the head is at the end of stage 2
    argv = arguments(tmp_path, data, section=section)
    assert ranks4.run(parts_of_labels, argv=argv) == [{3}, {3}, {3}, {2}]
