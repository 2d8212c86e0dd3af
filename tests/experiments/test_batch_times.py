"""Batch times of an experiment: measured on a real pipeline, kept in a file, found again by section."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_interlock import InterlockConfig
from ds_interlock.errors import ConfigError, DataError
from ds_interlock.planning.profile import LayerProfile
from ds_interlock.profiling.layers import FlopMeter
from experiments import batch_times, definition, stage_profile
from experiments.batch_times import BatchTimes, ProfileOfStages, Row, batch_seconds
from experiments.definition import Definition
from experiments.efficiency import ZERO_BUBBLE, phase_sections
from experiments.stage_profile import Pipeline, StagedModel, TaskProfile
from experiments.tasks import make_task

EXPERIMENT = """
title = "tiny"
about = ""
minutes = 1
num_stages = 3
seeds = [0]

[model]
kind = "prose"
width = 32
num_blocks = 3

[training]
num_steps = 4
micro_batch_size = 8
num_micro_batches = 2
optimizer = "adamw"
learning_rate = 1e-3

[measurements]
evaluate_every = 2
num_samples = 8
num_final_samples = 8

[modes.global]
interlock = { mode = "global" }

[modes.local]
interlock = { mode = "local" }

[modes."local, border norm"]
interlock = { mode = "local" }
model = { border_norm = true }

[modes."window 2"]
interlock = { mode = "interlock", window = 2 }

[modes."window 2, eager heads"]
interlock = { mode = "interlock", window = 2, head = { weight = 0.5, learning_rate_scale = 5.0 } }

[modes.growing]
interlock = { schedule = [{ from_step = 0, window = 1 }, { from_step = 2, window = 2 }] }

[modes."window 1.5"]
interlock = { mode = "interlock", window = 1.5 }

[modes.PipeDream]
asynchronous = "pipedream"

[modes."PipeDream, slow"]
asynchronous = "pipedream"
training = { learning_rate = 1e-4 }

[modes.2BW]
asynchronous = "2bw"
"""
WINDOW_2 = {"mode": "interlock", "window": 2}
GROWING = {"schedule": [{"from_step": 0, "window": 1}, {"from_step": 7, **WINDOW_2}]}
BOUNDS = (0, 2, 4, 7)


def unequal_model() -> StagedModel:
    """Three stages of 2, 2 and 3 layers; the last has the most to do."""
    costs = [(0.4, 0.0, 0.2), *[(0.5, 0.6, 0.3)] * 3, *[(0.4, 0.5, 0.2)] * 3]
    names = ("forward_seconds", "input_gradient_seconds", "weight_gradient_seconds")
    layers = [LayerProfile(name="", **dict(zip(names, passes, strict=True))) for passes in costs]
    return StagedModel(BOUNDS, tuple(layers), loss=0.25)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the definition of an experiment called tiny, whose layers are timed a few times only."""
    monkeypatch.setattr(stage_profile, "NUM_ROUNDS", 3)
    (tmp_path / "tiny.toml").write_text(EXPERIMENT)
    monkeypatch.setattr(definition, "FOLDER", tmp_path)
    return tmp_path


def row(section: dict[str, Any], micro_batches: int, relative_seconds: float) -> Row:
    return Row(
        mode="any",
        phase=None,
        interlock=section,
        micro_batches=micro_batches,
        seconds=1.0,
        relative_seconds=relative_seconds,
        predicted=3.0,
    )


def times_of(*rows: Row) -> BatchTimes:
    return BatchTimes(
        experiment="tiny",
        milliseconds=40.0,
        command="",
        machine={},
        versions={},
        profile=ProfileOfStages(stage_bounds=BOUNDS, stages=(), unit_seconds=0.002),
        rows=rows,
    )


def test_every_plan_is_measured_on_a_pipeline(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine no three times of a layer may be right.
    monkeypatch.setattr(stage_profile, "Stopwatch", lambda *_: FlopMeter(1e9))
    output = folder / "results" / "tiny.json"
    options = ["--micro_batches", "1", "--milliseconds", "8", "--output", str(output)]
    assert batch_times.main(["tiny", *options]) == 0
    times = batch_times.read(output)
    of_mode = {one.mode: one for one in times.rows if one.phase is None}
    # A model of its own is not timed; nor is 2BW, which needs 3 micro-batches here.
    interlocked = ["global", "local", "window 2", "window 2, eager heads", "window 1.5"]
    assert list(of_mode) == [*interlocked, "PipeDream", "PipeDream, slow", *ZERO_BUBBLE]
    # What is measured on a busy machine can be late in any order; it is compared with what must be slept.
    computed, torchs = (of_mode.pop(name) for name in ZERO_BUBBLE)
    order = ("global", "window 2", "local", "PipeDream")
    predicted = [of_mode[mode].predicted for mode in order]
    assert predicted == sorted(predicted, reverse=True)
    for one in (row for row in times.rows if row.mode not in ZERO_BUBBLE):
        assert one.relative_seconds == pytest.approx(one.seconds / 0.008)
        assert one.relative_seconds > 0.98 * one.predicted  # no stage sleeps too short
    assert computed.seconds is None
    assert computed.relative_seconds == computed.predicted < of_mode["global"].predicted
    assert torchs.predicted is None
    assert torchs.relative_seconds == pytest.approx(torchs.seconds / 0.008)
    # One micro-batch goes through all stages and back; only the weight gradients may overlap.
    chain = sum(of_stage["forward"] + of_stage["input_gradient"] for of_stage in times.profile.stages)
    assert torchs.relative_seconds > 0.98 * chain
    assert of_mode["PipeDream"].seconds == of_mode["PipeDream, slow"].seconds
    # Sections that differ in how heads learn share a pipeline.
    assert of_mode["window 2, eager heads"].seconds == of_mode["window 2"].seconds
    growing = {one.phase: one.seconds for one in times.rows if one.mode == "growing"}
    assert growing == {0: of_mode["local"].seconds, 2: of_mode["window 2"].seconds}
    # A unit is for the batch of the experiment, of two micro-batches; and the mean of a stage's forward.
    assert sum(stage["forward"] for stage in times.profile.stages) == pytest.approx(3)
    taken = batch_seconds(times, WINDOW_2, 1)
    assert taken == of_mode["window 2"].relative_seconds * times.profile.unit_seconds
    assert "| window 2 |  | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "loss", "heads", "parts"),
    [
        ({"mode": "interlock", "window": 1.5, "extra_in_flight": 1}, 0.25, {3: 6.0, 6: 0.3}, 6.0),
        ({"mode": "global"}, 9.0, {}, 9.0),
    ],
    ids=["head within a stage", "final loss"],
)
def test_heads_and_final_loss_sleep(
    section: dict[str, Any], loss: float, heads: dict[int, float], parts: float
) -> None:
    """Each is made so long that without it a batch would be far below what the simulator says."""
    pipeline = Pipeline(InterlockConfig(**section), replace(unequal_model(), loss=loss), heads)
    assert pipeline.predicted(2) > 2 * parts
    assert pipeline.seconds([2], 0.004)[2] > 0.98 * 0.004 * pipeline.predicted(2)


def test_predictions_worked_by_hand() -> None:
    model = unequal_model()
    heads = {2: 0.1, 4: 1.0}
    local = Pipeline(InterlockConfig(mode="local"), model, heads)
    # Streaming: the slowest stage sets the pace. Stage 1, with its head, takes 2.8 + 1.0.
    assert local.predicted(1) == pytest.approx(3.8)
    assert local.predicted(4) == pytest.approx(4 * 3.8)
    stopping = Pipeline(InterlockConfig(mode="local", streaming=False), model, heads)
    # All wait for the last stage: the forwards before it, 0.9 + 1.0, then its own 3.3 + 0.25.
    assert stopping.predicted(1) == pytest.approx(1.9 + 3.55)
    # Heads and their waits are left out: the slowest stage is the last one, with the loss.
    assert Pipeline.asynchronous(model).predicted(1) == pytest.approx(3.3 + 0.25)
    # ZB-H1: all forwards, the loss and input gradients in a row, and the weight gradient of the first stage.
    assert model.zb_h1(1) == pytest.approx((0.9 + 1.0 + 1.2 + 0.25) + (1.5 + 1.2 + 0.6) + 0.5)
    end_to_end = Pipeline(InterlockConfig(), model, {})
    assert end_to_end.predicted(1) == pytest.approx((0.9 + 0.6 + 0.5) + (1.0 + 1.2 + 0.6) + 3.55)


def test_the_profile_of_a_task(folder: Path) -> None:
    run = definition.load("tiny").runs("tiny")[0]
    profile = TaskProfile(make_task(run))
    assert profile.model.stage_bounds == (0, 4, 6, 10)
    assert sum(layer.forward_seconds for layer in profile.model.layers) == pytest.approx(3)
    assert profile.unit_seconds > 0
    first, *others = profile.model.layers
    assert first.input_gradient_seconds == 0  # its input is data
    assert all(layer.input_gradient_seconds > 0 for layer in others)
    assert profile.model.loss > 0
    heads = profile.heads_of(InterlockConfig(mode="interlock", window=1.5))
    assert heads.keys() == {5, 8}  # after the first of 2 layers, the second of 4
    assert all(units > 0 for units in heads.values())
    eager = InterlockConfig.from_deepspeed(
        {"interlock": {"mode": "interlock", "window": 1.5, "head": {"learning_rate_scale": 2.0}}}
    )
    assert profile.heads_of(eager) == heads  # timed once
    assert profile.heads_of(InterlockConfig()) == {}


def test_the_first_layer_of_a_picture_model_owes_no_input_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_profile, "NUM_ROUNDS", 1)
    images = {"kind": "images", "depth": 8, "width": 2, "num_train_images": 64}
    contents = {
        "title": "",
        "about": "",
        "minutes": 1,
        "num_stages": 3,
        "seeds": [0],
        "model": images,
        "training": {"num_steps": 1, "micro_batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1},
        "measurements": {"evaluate_every": 1, "num_samples": 8, "num_final_samples": 8},
        "modes": {"global": {"interlock": {"mode": "global"}}},
    }
    run = Definition.model_validate(contents).runs("pictures")[0]
    profile = TaskProfile(make_task(run))
    first, second = (layer.input_gradient_seconds for layer in profile.model.layers[:2])
    assert first == 0 < second
    assert profile.heads_of(InterlockConfig(mode="local")).keys() == {2, 3}


def test_a_time_is_found_by_what_it_depends_on() -> None:
    times = times_of(
        row({"mode": "local"}, 1, 3.5),
        row({"mode": "local"}, 4, 3.25),
        row(WINDOW_2, 1, 5.5),
        row({**WINDOW_2, "head": {"type": "linear"}}, 1, 5.0),
        row({**WINDOW_2, "streaming": False}, 1, 6.0),
        row({**WINDOW_2, "extra_in_flight": 1}, 1, 5.25),
        row({"mode": "global"}, 1, 9.0),
    )
    assert batch_seconds(times, {"mode": "local"}, 4) == pytest.approx(3.25 * 0.002)
    assert batch_seconds(times, {"mode": "interlock", "window": 1}, 1) == pytest.approx(3.5 * 0.002)
    assert batch_seconds(times, {"mode": "interlock", "window": 3}, 1) == pytest.approx(9.0 * 0.002)
    learning = {"type": "norm_linear", "weight": 0.5, "warmup_steps": 3, "warmup_learning_rate": 0.1}
    assert batch_seconds(times, {**WINDOW_2, "head": learning}, 1) == pytest.approx(5.5 * 0.002)
    for section, expected in (
        ({"head": {"type": "linear"}}, 5.0),
        ({"streaming": False}, 6.0),
        ({"extra_in_flight": 1}, 5.25),
    ):
        assert batch_seconds(times, {**WINDOW_2, **section}, 1) == pytest.approx(expected * 0.002)
    with pytest.raises(DataError, match=r"4 micro-batches: measure it with .*tiny --micro_batches 4"):
        batch_seconds(times, WINDOW_2, 4)
    with pytest.raises(DataError, match=r"no batch time of .*token_fraction"):
        batch_seconds(times, {**WINDOW_2, "head": {"token_fraction": 0.5}}, 1)


def test_a_schedule_has_a_time_for_every_phase() -> None:
    times = times_of(row({"mode": "local"}, 1, 3.5), row(WINDOW_2, 1, 5.5))
    seconds = {step: batch_seconds(times, section, 1) for step, section in phase_sections(GROWING)}
    assert seconds == {0: pytest.approx(3.5 * 0.002), 7: pytest.approx(5.5 * 0.002)}
    with pytest.raises(ConfigError, match="ask for one of phase_sections"):
        batch_seconds(times, GROWING, 1)


def test_files_that_are_none_of_ours_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    with pytest.raises(ConfigError, match=r"times\.json: cannot read the file of batch times: .*; measure"):
        batch_times.read(file)
    times = times_of(row(WINDOW_2, 1, 5.5))
    file.write_text(times.model_dump_json())
    assert batch_times.read(file) == times
    contents = json.loads(file.read_text())
    file.write_text(file.read_text()[:-5])
    with pytest.raises(ConfigError, match="not a file of batch times: the file: Invalid JSON"):
        batch_times.read(file)
    file.write_text(json.dumps({**contents, "format": 2}))
    with pytest.raises(ConfigError, match="format: Input should be 1"):
        batch_times.read(file)
    del contents["rows"][0]["seconds"]
    file.write_text(json.dumps(contents))
    with pytest.raises(ConfigError, match=r"rows\.0\.seconds: Field required"):
        batch_times.read(file)


def test_an_unknown_experiment_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch_times.main(["unheard", "--output", str(folder / "times.json")]) == 1
    assert "there is no experiment 'unheard': expected one of tiny" in capsys.readouterr().err
    assert not (folder / "times.json").exists()


@pytest.mark.parametrize("option", [("--micro_batches", "0"), ("--milliseconds", "0")])
def test_impossible_numbers_are_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        batch_times.main(["tiny", *option])
    assert f"{option[0]}: got 0, expected" in capsys.readouterr().err
