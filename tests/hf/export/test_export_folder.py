"""A folder of an export is whole or not there, whatever happens while it is written."""

import errno
import resource
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from finetuned_checkpoints import layers_of, write_checkpoint

from ds_interlock.errors import ConfigError
from ds_interlock.hf.export import model_folder
from ds_interlock.hf.export.model import export_model
from ds_interlock.schedule.plan import GradientFlowPlan

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def step(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    plan = GradientFlowPlan.local(stage_bounds=[0, 2, len(layers_of(model))])
    return write_checkpoint(tmp_path / "job" / "checkpoints", model, plan)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become larger than 64 KiB: the system itself stops the writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_too_little_room_is_found_before_anything_is_written(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folder.shutil, "disk_usage", lambda path: Usage(1000, 1, 999))
    with pytest.raises(ConfigError, match=r"new/out does not fit .* takes 157,568 bytes, and 999 are free"):
        export_model(step, tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_a_write_that_the_system_stops_leaves_nothing(step: Path, tmp_path: Path, small_files: None) -> None:
    with pytest.raises(ConfigError, match=r"out cannot be written .*File too large.* takes 157,568 bytes"):
        export_model(step, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_a_full_disk_leaves_what_was_there(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(step, tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_folder.FineTunedCheckpoint, "copy_companions", fail)
    with pytest.raises(ConfigError, match=r"No space left on device.*bytes, and [\d,]+ are free"):
        export_model(step, tmp_path / "out", max_shard_size="40KB")
    assert contents(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"job", "out"}


def test_a_model_is_replaced_as_a_whole(step: Path, tmp_path: Path) -> None:
    export_model(step, tmp_path / "out", max_shard_size="40KB")
    export_model(step, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"job", "out"}


@pytest.mark.bad_input
def test_what_is_no_model_is_not_replaced(step: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="not empty and holds no Hugging Face model"):
        export_model(step, tmp_path / "notes")
    with pytest.raises(ConfigError, match="is a file"):
        export_model(step, tmp_path / "notes" / "mine.txt")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    export_model(step, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("path", ["hf", ".", "..", "global_step7"])
def test_what_is_exported_is_not_replaced(path: str, step: Path) -> None:
    checkpoints = step.parent
    (checkpoints.parent / "config.json").write_text("{}")
    before = sorted(checkpoints.rglob("*"))
    with pytest.raises(ConfigError, match="give a"):
        export_model(step, checkpoints / path)
    assert sorted(checkpoints.rglob("*")) == before
