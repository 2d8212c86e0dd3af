"""A whole job under the ``deepspeed`` launcher: what a user starts, and what a fault does to it.

Everything else about jobs, and the other jobs, is tested on ranks that are up already.
"""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from launching import launch
from ranks import RankPool
from safetensors.torch import load_file
from test_train_lm import SMALL, train_lm, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def test_train_lm_leaves_a_hugging_face_model_and_can_be_resumed(ranks2: RankPool, tmp_path: Path) -> None:
    text, whole = write_text(tmp_path / "text"), tmp_path / "whole"
    words = ["--train_file", text, "--max_steps", 6, "--save_steps", 3, "--logging_steps", 2]
    job = launch(
        "launcher/train_lm.py",
        *("--deepspeed_config", "configs/interlock.json", "--output_dir", whole, "--generate", 8),
        *SMALL,
        *words,
        *("--eval_steps", 4),
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.findall(r"^step (\d)/6: loss ", job.stdout, re.MULTILINE) == ["2", "4", "6"]
    assert re.findall(r"^step (\d): validation loss", job.stdout, re.MULTILINE) == ["4", "6"]
    assert "mode interlock, window 2: 2 stages, 6 steps" in job.stdout
    for useless in ("\r", "Using topology", "WARNING", "Loading weights"):
        assert useless not in job.stdout + job.stderr, job.stdout + job.stderr

    model = AutoModelForCausalLM.from_pretrained(whole / "hf")
    ids = AutoTokenizer.from_pretrained(whole / "hf")("aa and x;", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], 300)
    caption = (whole / "timeline.svg").read_text()
    assert re.search(r"measured: the median of 2 batches, 2 processes on \d+ cores", caption)

    resume = "--resume_from_checkpoint", whole / "checkpoints" / "global_step3"
    metrics = train_lm(ranks2, tmp_path / "halves", *words, *resume)
    assert metrics["validation_loss"] == json.loads((whole / "metrics.json").read_text())["validation_loss"]
    undisturbed = load_file(whole / "hf" / "model.safetensors")
    for name, weight in load_file(tmp_path / "halves" / "hf" / "model.safetensors").items():
        assert torch.equal(weight, undisturbed[name]), name


def test_the_death_of_a_rank_ends_the_job() -> None:
    started = time.monotonic()
    job = launch("tests/helpers/failing_job.py")
    assert job.returncode != 0
    # Which of the two ranks the launcher sees first is a matter of chance.
    assert re.search(r"exits with return code = [13]", job.stdout), job.stdout
    assert "PeerError: " in job.stderr, job.stderr
    assert time.monotonic() - started < 120
