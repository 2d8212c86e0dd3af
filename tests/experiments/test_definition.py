"""Experiments as files: what runs they mean, and what is wrong with them."""

from pathlib import Path

import pytest

from ds_interlock.errors import ConfigError
from experiments import definition
from experiments.definition import Run

TINY = """
title = "Tiny"
about = "Nothing."
minutes = 1.5
num_stages = 4
seeds = [3, 5]

[model]
kind = "prose"
width = 32
num_blocks = 4

[training]
num_steps = 100
micro_batch_size = 2
optimizer = "sgd"
learning_rate = 0.5

[measurements]
evaluate_every = 50
num_samples = 8
num_final_samples = 16

[modes.global]
interlock = { mode = "global" }

[modes.local]
interlock = { mode = "local" }
num_steps = 150
seeds = [3]

[modes.normed]
interlock = { mode = "interlock", window = 3 }
model = { border_norm = true }
num_steps = 60
seeds = [5, 7]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(definition, "FOLDER", tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> None:
    (folder / "tiny.toml").write_text(text)


def test_the_experiments_of_the_project_are_sound() -> None:
    for name in definition.names():
        loaded = definition.load(name)
        runs = loaded.runs(name)
        assert len({(run.mode, run.seed) for run in runs}) == len(runs)
        for run in runs:
            if "schedule" not in run.interlock:
                plan = run.section.plan([4 * stage for stage in range(run.num_stages + 1)])
                assert plan.num_stages == run.num_stages
        assert {"global", "local", "window 2"} <= set(loaded.modes), f"{name}: the summary's modes"


def test_runs_are_made_seed_by_seed(folder: Path) -> None:
    write(folder, TINY)
    runs = definition.load("tiny").runs("tiny")
    assert [(run.mode, run.seed) for run in runs] == [
        ("global", 3),
        ("local", 3),
        ("global", 5),
        ("normed", 5),
        ("normed", 7),
    ]
    assert {run.experiment for run in runs} == {"tiny"}


def test_a_mode_changes_what_it_names_and_nothing_else(folder: Path) -> None:
    write(folder, TINY)
    reference, local, _, normed, _ = definition.load("tiny").runs("tiny")
    assert [run.num_steps for run in (reference, local, normed)] == [100, 150, 100]  # never below the budget
    assert not reference.model.border_norm
    assert normed.model == reference.model.model_copy(update={"border_norm": True})
    assert normed.model.width == 32
    assert normed.training == reference.training
    assert normed.section.window == 3


def test_a_run_survives_the_results_file(folder: Path) -> None:
    images = TINY.replace(
        'kind = "prose"\nwidth = 32\nnum_blocks = 4', 'kind = "images"\nhead_channels = [8]'
    )
    write(folder, images.replace("border_norm = true", "depth = 32"))
    run = definition.load("tiny").runs("tiny")[0]
    assert run.model.head_channels == (8,)
    assert Run.model_validate_json(run.model_dump_json()) == run


def test_a_definition_may_be_like_another(folder: Path) -> None:
    write(folder, TINY)
    (folder / "wide.toml").write_text('like = "tiny"\ntitle = "Wide"\n[model]\nwidth = 48\n')
    tiny, wide = definition.load("tiny"), definition.load("wide")
    assert (wide.title, wide.conclusions, wide.model.width) == ("Wide", "", 48)
    changed = {"title", "conclusions", "model"}
    assert wide.model_dump(exclude=changed) == tiny.model_dump(exclude=changed)
    assert wide.model.model_copy(update={"width": 32}) == tiny.model
    (folder / "wide.toml").write_text('like = "tinny"')
    with pytest.raises(ConfigError, match=r"no experiment 'tinny'"):
        definition.load("wide")


def test_an_unknown_experiment_names_the_known_ones(folder: Path) -> None:
    write(folder, TINY)
    (folder / "other.toml").write_text(TINY)
    with pytest.raises(ConfigError, match=r"no experiment 'tinny': expected one of other, tiny$"):
        definition.load("tinny")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[modes.global]", "[modes.normal]", 'expected one named "global"'),
        ('{ mode = "global" }', '{ mode = "local" }', 'expected one named "global"'),
        ("window = 3", "windwo = 3", "windwo"),
        ("window = 3", "window = 0", "window"),
        ("minutes = 1.5", "minutes = 0", r"minutes: Input should be greater than 0, got 0"),
        ("seeds = [3, 5]", "seeds = []", "seeds: Tuple should have at least 1 item"),
        ("num_steps = 100", "num_steps = 0", r"training\.num_steps: .*got 0"),
        ('optimizer = "sgd"', 'optimizer = "adam"', r"optimizer: .*'nadam' or 'sgd', got 'adam'"),
        ('kind = "prose"', 'kind = "sounds"', r"model: .*'prose', 'images'"),
        ("width = 32", "widht = 32", r"model\.prose\.widht: Extra inputs are not permitted, got 32"),
        ("evaluate_every = 50\n", "", r"measurements\.evaluate_every: Field required"),
        ("minutes = 1.5", "minutes =", "not valid TOML"),
    ],
)
def test_faults_are_named(folder: Path, old: str, new: str, message: str) -> None:
    assert old in TINY
    write(folder, TINY.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        definition.load("tiny")
    assert str(folder / "tiny.toml") in str(caught.value)


def test_all_faults_are_listed_at_once(folder: Path) -> None:
    write(folder, TINY.replace("minutes = 1.5", "minutes = -1").replace("num_stages = 4", "num_stages = 1"))
    with pytest.raises(ConfigError, match=r"2 faults\n  - minutes: .*\n  - num_stages: "):
        definition.load("tiny")
