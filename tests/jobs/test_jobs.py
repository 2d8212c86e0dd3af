"""Whole jobs under the ``deepspeed`` launcher: what a user starts, and what a user gets wrong."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import free_port
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def run(script: str, *arguments: object, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Starts a job as a user does, and waits for it."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", ranks, "--master_port", free_port()]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(word) for word in (*command, script, *arguments)],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def train_lm(
    output_dir: Path, *arguments: object, config: object = "configs/interlock.json"
) -> subprocess.CompletedProcess[str]:
    small = "--vocab_size 300 --seq_length 16 --width 16 --num_blocks 4 --num_heads 2 --max_eval_samples 32"
    return run(
        "launcher/train_lm.py",
        *("--deepspeed_config", config, "--output_dir", output_dir, "--generate", 8),
        *small.split(),
        *arguments,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty documents in a small, regular language."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        words = [f"{'abc'[(number + i) % 3] * 2} and {'xyz'[i % 3] * (1 + i % 2)};" for i in range(120)]
        (folder / f"{number:02}.txt").write_text(f"Chapter {number}.\n" + " ".join(words))
    return folder


def test_trains_in_interlock_mode_and_leaves_a_hugging_face_model(text: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    job = train_lm(whole, "--train_file", text, "--max_steps", 6, "--save_steps", 3, "--eval_steps", 4)
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.search(r"step 4: validation loss", job.stdout + job.stderr)

    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["mode"] == "interlock"
    assert metrics["steps"] == 6
    assert metrics["num_stages"] == 2
    assert math.isclose(metrics["validation_loss"], metrics["exported_validation_loss"], abs_tol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(whole / "hf")
    tokenizer = AutoTokenizer.from_pretrained(whole / "hf")
    ids = tokenizer("aa and x;", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], 300)
    assert (whole / "timeline.svg").read_text().count("<svg") == 1

    resumed = train_lm(
        halves, "--train_file", text, "--max_steps", 6, "--resume_from_checkpoint",
        whole / "checkpoints" / "global_step3",
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    undisturbed = load_file(whole / "hf" / "model.safetensors")
    for name, weight in load_file(halves / "hf" / "model.safetensors").items():
        assert torch.equal(weight, undisturbed[name]), name


@pytest.mark.parametrize("mode", ["global", "local"])
def test_the_config_alone_changes_the_mode(mode: str, text: Path, tmp_path: Path) -> None:
    job = train_lm(tmp_path, "--train_file", text, "--max_steps", 2, config=f"configs/{mode}.json")
    assert job.returncode == 0, job.stdout + job.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["mode"] == mode


def test_the_window_changes_on_the_way(text: Path, tmp_path: Path) -> None:
    contents = json.loads((ROOT / "configs/schedule.json").read_text())
    for number, phase in enumerate(contents["interlock"]["schedule"]):
        phase["from_step"] = number
    contents["interlock"]["myopia"] = {"every": 1}
    contents["tensorboard"] = {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "job"}
    config = tmp_path / "schedule.json"
    config.write_text(json.dumps(contents))
    job = train_lm(tmp_path / "out", "--train_file", text, "--max_steps", 4, config=config)
    assert job.returncode == 0, job.stdout + job.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["mode"], metrics["steps"]) == ("schedule", 4)
    assert math.isclose(metrics["validation_loss"], metrics["exported_validation_loss"], abs_tol=1e-4)

    monitor = EventAccumulator(str(tmp_path / "monitor" / "job")).Reload()
    # Two stages: under window 1 stage 0 has a loss of its own, window 2 is global already.
    assert len(monitor.Scalars("Train/stage_0/loss_after_layer_4")) == 1
    cosines = [event.value for event in monitor.Scalars("Train/stage_0/gradient_cosine")]
    assert len(cosines) == 4
    assert -1 <= cosines[0] < 0.999
    assert cosines[2:] == [1, 1]


def test_the_configs_differ_in_their_section_alone() -> None:
    names = ("global", "local", "interlock", "schedule")
    configs = [json.loads((ROOT / f"configs/{name}.json").read_text()) for name in names]
    sections = [config.pop("interlock") for config in configs]
    assert all(config == configs[0] for config in configs)
    assert [section.get("mode") for section in sections] == ["global", "local", "interlock", None]


def assert_fails_with(job: subprocess.CompletedProcess[str], error: str, times: int = 1) -> None:
    output = job.stdout + job.stderr
    assert job.returncode != 0, output
    assert len(re.findall(error, output)) == times, output


def test_a_missing_text_file_is_named_once(tmp_path: Path) -> None:
    job = train_lm(tmp_path / "out", "--train_file", tmp_path / "nowhere.txt")
    assert_fails_with(job, r"nowhere\.txt does not exist: expected a text file")
    assert "Traceback" not in job.stderr


def test_a_text_too_small_for_a_batch_says_what_a_batch_needs(tmp_path: Path, text: Path) -> None:
    job = train_lm(tmp_path / "out", "--train_file", text, "--seq_length", 30000)
    assert_fails_with(job, r"tokens.*one batch|batch.*tokens")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("data", r"DataError: the data iterator ended in the middle of a batch"),
        ("head", r"ConfigError: the auxiliary head after layer 2 \(stage 0\) failed"),
        # The launcher may end the others before they can say that they miss a neighbour.
        ("death", "exits with return code = 3"),
    ],
    ids=["data", "head", "death"],
)
def test_a_fault_on_one_rank_ends_the_job(fault: str, error: str) -> None:
    started = time.monotonic()
    job = run("tests/helpers/failing_job.py", fault)
    assert job.returncode != 0
    assert re.search(error, job.stdout + job.stderr), job.stderr
    assert time.monotonic() - started < 120


def test_ranks_with_different_configs_are_told_what_differs() -> None:
    job = run("tests/helpers/failing_job.py", "config")
    assert job.returncode != 0
    assert re.search(r"interlock\.combine is missing on rank 0, 'farthest' on rank 1", job.stderr), job.stderr
