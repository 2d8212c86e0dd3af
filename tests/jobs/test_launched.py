"""Whole jobs under the ``deepspeed`` launcher, one of each: what a user starts, and what a fault does to it.

Everything else about jobs is tested on ranks that are up already.
"""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from finetuning import LOCAL, arguments, loss_of, rows_of, save_tiny, tiny_tokenizer, write_lines
from image_files import write_idx
from launching import launch
from ranks import RankPool
from safetensors.torch import load_file
from test_train_lm import SMALL, train_lm, write_text
from test_train_resnet import SMALL as SMALL_RESNET
from test_train_resnet import TEST, TRAIN
from tiny_tokenizers import CHATML
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


def test_finetune_turns_chats_into_a_model(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", max_position_embeddings=128)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [[("user", "ab" * n), ("assistant", "ba" * n)] for n in range(1, 9)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    write_lines(tmp_path / "train.jsonl", chats)
    write_lines(tmp_path / "valid.jsonl", chats[:3])
    words = arguments(tmp_path, tmp_path, "--seq_length", 128, "--max_steps", 10, section=LOCAL)
    job = launch("launcher/finetune.py", *words)
    assert job.returncode == 0, job.stdout + job.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", dtype=torch.float32)
    rows = rows_of(tmp_path / "valid.jsonl", tokenizer, 128)
    assert loss_of(model, rows) == pytest.approx(metrics["eval_loss"], abs=1e-5)


def test_train_resnet_counts_errors(tmp_path: Path) -> None:
    write_idx(tmp_path, TRAIN, TEST, zipped=True)
    words = "--deepspeed_config", "configs/resnet/local.json", "--data_dir", tmp_path, "--max_steps", 2
    job = launch("launcher/train_resnet.py", *words, *SMALL_RESNET, "--output_dir", tmp_path / "out")
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.search(r"mode local: 2 stages, 2 steps.*\ntest error \d+\.\d\d %", job.stdout)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_stages"] == 2


def test_the_death_of_a_rank_ends_the_job() -> None:
    started = time.monotonic()
    job = launch("tests/helpers/failing_job.py")
    assert job.returncode != 0
    # Which of the two ranks the launcher sees first is a matter of chance.
    assert re.search(r"exits with return code = [13]", job.stdout), job.stdout
    assert "PeerError: " in job.stderr, job.stderr
    assert time.monotonic() - started < 120
