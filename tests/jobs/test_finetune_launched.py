"""``launcher/finetune.py`` as a user starts it: under the ``deepspeed`` launcher."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetuning import (
    LOCAL,
    ROOT,
    arguments,
    loss_of,
    rows_of,
    save_tiny,
    tiny_tokenizer,
    write_data,
    write_lines,
)
from ranks import free_port
from tiny_tokenizers import CHATML
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def launch(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Starts the job on two ranks, and waits for it."""
    bin_folder = Path(sys.executable).parent
    command = [
        bin_folder / "deepspeed",
        "--num_gpus",
        2,
        "--master_port",
        free_port(),
        "launcher/finetune.py",
    ]
    path = os.pathsep.join([str(bin_folder), os.environ["PATH"]])
    return subprocess.run(
        [*map(str, command), *argv],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_chats_in_a_model_out(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", max_position_embeddings=128)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [[("user", "ab" * n), ("assistant", "ba" * n)] for n in range(1, 9)]
    chats = [{"messages": [{"role": who, "content": what} for who, what in chat]} for chat in turns]
    write_lines(tmp_path / "train.jsonl", chats)
    write_lines(tmp_path / "valid.jsonl", chats[:3])
    job = launch(arguments(tmp_path, tmp_path, "--seq_length", 128, "--max_steps", 10, section=LOCAL))
    assert job.returncode == 0, job.stdout + job.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", dtype=torch.float32)
    rows = rows_of(tmp_path / "valid.jsonl", tokenizer, 128)
    assert loss_of(model, rows) == pytest.approx(metrics["eval_loss"], abs=1e-5)


def test_a_fault_that_one_rank_sees_ends_all_with_one_sentence(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    write_data(tmp_path)
    started = time.monotonic()
    job = launch(arguments(tmp_path, tmp_path, "--max_train_samples", 3, section=LOCAL))
    output = job.stdout + job.stderr
    assert job.returncode != 0, output
    assert output.count("finetune: 3 training samples may fill as few as 3 rows") == 1, output
    assert "Traceback" not in output
    assert time.monotonic() - started < 100
    assert not (tmp_path / "out" / "metrics.json").exists()
