"""The job ``train_resnet`` on small images: what it counts is exact, and what it saves is the model."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import refusal, run_launcher
from image_files import evaluate, striped_images, write_idx
from ranks import RankPool
from torch import nn

from ds_interlock import ConfigError, InterlockConfig
from ds_interlock.hf.export.lm import read_layer_states
from ds_interlock.images.batches import evaluation_batches
from ds_interlock.images.data import Normalisation, Score
from ds_interlock.jobs import train_resnet as job
from ds_interlock.models.resnet import ResNetConfig, build_resnet

ROOT = Path(__file__).parents[2]

TRAIN, TEST = striped_images(96, seed=1), striped_images(37, seed=2)  # no micro-batch size divides 37
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_print": None,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}},
}
SMALL = ("--depth", 8, "--width", 4, "--head_channels", 6)
RESNET = ResNetConfig(depth=8, num_classes=10, in_channels=1, width=4, seed=42)


def train_resnet(argv: list[str]) -> str:
    """The job, as a function that the pool's ranks can call; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_launcher("train_resnet", argv)
    return printed.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Striped images in IDX files."""
    folder = tmp_path_factory.mktemp("images")
    write_idx(folder, TRAIN, TEST, zipped=True)
    return folder


def run(
    pool: RankPool, output_dir: Path, images: Path, *arguments: object, section: dict[str, Any], **keys: Any
) -> dict[str, Any]:
    """Trains into ``output_dir``; returns the metrics."""
    config = {**CONFIG, **keys, "interlock": {"timeout_seconds": 60, **section}}
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.json").write_text(json.dumps(config))
    argv = ["--deepspeed_config", output_dir / "config.json", "--data_dir", images]
    argv += [*SMALL, "--output_dir", output_dir, *arguments]
    pool.run(train_resnet, argv=[str(word) for word in argv])
    metrics: dict[str, Any] = json.loads((output_dir / "metrics.json").read_text())
    return metrics


def saved_model(output_dir: Path, config: ResNetConfig, tag: str = "") -> nn.Module:
    """The model in a checkpoint, in one process."""
    states = read_layer_states(output_dir / "checkpoints" / tag)
    model = build_resnet(config)
    model.load_state_dict({f"{n}.{name}": t for n, state in states.items() for name, t in state.items()})
    return model


def score_of(model: nn.Module) -> Score:
    return evaluate(model, evaluation_batches(TEST, Normalisation.of(TRAIN), 37))


def assert_score_is(metrics: dict[str, Any], score: Score) -> None:
    assert metrics["num_test_images"] == score.num_images == 37
    assert metrics["num_test_errors"] == score.num_errors
    assert metrics["test_error"] == score.error
    assert metrics["test_loss"] == pytest.approx(score.loss, rel=1e-5)


INTERLOCK = {"mode": "interlock", "window": 2}


def test_a_config_of_ours_and_what_is_printed(ranks2: RankPool, images: Path, tmp_path: Path) -> None:
    words = ("--deepspeed_config", ROOT / "configs" / "resnet" / "local.json", "--data_dir", images)
    argv = [*words, *SMALL, "--max_steps", 2, "--output_dir", tmp_path]
    printed = ranks2.run(train_resnet, argv=[str(word) for word in argv])
    assert re.search(r"mode local: 2 stages, 2 steps.*\ntest error \d+\.\d\d %", printed[0])


def test_four_stages_learn_and_resume_bit_for_bit(ranks4: RankPool, images: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    arguments = ("--max_steps", 24, "--save_steps", 12, "--eval_steps", 9, "--no_augment")
    metrics = run(ranks4, whole, images, *arguments, section=INTERLOCK)
    assert (metrics["num_stages"], metrics["steps"], metrics["epochs"]) == (4, 24, 4.0)
    assert metrics["test_error"] < 0.1
    assert (whole / "timeline.svg").read_text().count("<svg") == 1
    undisturbed = saved_model(whole, RESNET)
    assert_score_is(metrics, score_of(undisturbed))

    checkpoint = whole / "checkpoints" / "global_step12"
    resumed_metrics = run(
        ranks4, halves, images, *arguments, "--resume_from_checkpoint", checkpoint, section=INTERLOCK
    )
    resumed = saved_model(halves, RESNET).state_dict()
    half_way = saved_model(whole, RESNET, "global_step12").state_dict()
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(resumed[name], tensor), name
        assert not torch.equal(half_way[name], tensor), name
    assert resumed_metrics["test_loss"] == metrics["test_loss"]


@pytest.mark.parametrize("mode", ["global", "local"])
def test_replicas_count_every_image_once(mode: str, ranks4: RankPool, images: Path, tmp_path: Path) -> None:
    """Two stages, two replicas; every option of the model has another value than its default."""
    options = ("--num_stages", 2, "--depth", 11, "--block", "bottleneck", "--shortcut", "B", "--seed", 7)
    steps = ("--max_steps", 3, "--head_channels")  # none
    metrics = run(ranks4, tmp_path, images, *options, *steps, section={"mode": mode})
    assert (metrics["num_stages"], metrics["depth"], metrics["seed"]) == (2, 11, 7)
    assert metrics["epochs"] == 3 * 32 / 96
    config = ResNetConfig(11, 10, in_channels=1, width=4, block="bottleneck", shortcut="B", seed=7)
    assert_score_is(metrics, score_of(saved_model(tmp_path, config)))


def test_half_precision_trains_and_scores(ranks4: RankPool, images: Path, tmp_path: Path) -> None:
    half = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    metrics = run(ranks4, tmp_path, images, "--max_steps", 3, section=INTERLOCK, **half)
    score = score_of(saved_model(tmp_path, RESNET))  # its weights in float32
    assert metrics["test_loss"] == pytest.approx(score.loss, rel=0.02)


def test_fewer_images_and_crops_change_what_is_trained(
    ranks4: RankPool, images: Path, tmp_path: Path
) -> None:
    states = []
    for name, extra in (
        ("all", ["--no_augment"]),
        ("some", ["--no_augment", "--max_train_samples", 50]),
        ("crops", []),
    ):
        arguments = (*extra, "--max_steps", 1, "--max_eval_samples", 9)
        metrics = run(ranks4, tmp_path / name, images, *arguments, section=INTERLOCK)
        assert metrics["num_test_images"] == 9
        states.append(saved_model(tmp_path / name, RESNET).state_dict()["1.convolution_1.weight"])
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def learning_rates(num_steps: int, max_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = job.step_schedule(max_steps)(optimizer)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_learning_rate_falls_after_half_and_three_quarters_of_the_steps() -> None:
    expected = [0.5] * 4 + [0.05] * 2 + [0.005] * 2
    assert learning_rates(8, max_steps=8) == pytest.approx(expected)


def test_the_schedule_is_the_configs_if_it_has_one(ranks4: RankPool, images: Path, tmp_path: Path) -> None:
    zero = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0, "warmup_num_steps": 2}}
    run(ranks4, tmp_path, images, "--max_steps", 2, section=INTERLOCK, scheduler=zero)
    weights = dict(build_resnet(RESNET).named_parameters())
    for name, weight in saved_model(tmp_path, RESNET).named_parameters():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.bad_input
def test_a_head_for_language_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'head.type: "lens" is for language models: .*--head_channels'):
        job.check_heads(InterlockConfig.from_deepspeed({"interlock": {"head": {"type": "lens"}}}))
    job.check_heads(InterlockConfig.from_deepspeed({"interlock": {"head": {"weight": 0.5}}}))


def test_the_configs_differ_in_their_section_alone() -> None:
    configs = [
        json.loads((ROOT / f"configs/resnet/{mode}.json").read_text())
        for mode in ("global", "local", "interlock")
    ]
    sections = [config.pop("interlock") for config in configs]
    assert configs[0] == configs[1] == configs[2]
    assert [section["mode"] for section in sections] == ["global", "local", "interlock"]


@pytest.mark.bad_input
def test_a_missing_data_set_is_named_once(ranks2: RankPool, tmp_path: Path) -> None:
    words = ["--deepspeed_config", ROOT / "configs/resnet/local.json", "--data_dir", tmp_path]
    argv = [str(word) for word in [*words, "--output_dir", tmp_path / "out"]]
    assert "apt-get install dataset-fashion-mnist, or give the folder" in refusal(
        ranks2, argv, "train_resnet"
    )
