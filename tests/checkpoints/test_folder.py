"""Folders of checkpoints: tags, and damage of every kind that is found before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ds_interlock import ConfigError
from ds_interlock.checkpoints.folder import (
    LIST_FILE,
    SIZES_ONLY,
    find_fault,
    folder_of,
    latest_folder,
    newest_complete,
    newest_first,
    remove_oldest,
    write_list,
)


def checkpoint(save_dir: Path, step: int, tag: str | None = None) -> Path:
    folder = save_dir / (tag or f"global_step{step}")
    folder.mkdir(parents=True)
    for name in ("layer_00-model_states.pt", "interlock_stage_00.pt"):
        torch.save({"weight": torch.arange(64.0) + step}, folder / name)
    (folder / "note.txt").write_text("anything")
    write_list(folder, step)
    return folder


@pytest.mark.bad_input
@pytest.mark.parametrize("tag", ["", ".", "..", "../other", "/etc", "a/b", "a/..", "a/"])
def test_a_tag_that_is_no_name_is_refused(tmp_path: Path, tag: str) -> None:
    with pytest.raises(ConfigError, match="is no tag of a checkpoint in"):
        folder_of(tmp_path, tag)
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(ConfigError, match="is no tag of a checkpoint in"):
        latest_folder(tmp_path)


def test_other_tags_are_names_of_folders(tmp_path: Path) -> None:
    assert latest_folder(tmp_path) is None
    (tmp_path / "latest").write_text("step 5.final\n")
    assert latest_folder(tmp_path) == tmp_path / "step 5.final" == folder_of(tmp_path, "step 5.final")


def test_damage_is_found_wherever_it_is(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    file = folder / "layer_00-model_states.pt"
    whole, harmless = file.read_bytes(), 0
    assert find_fault(folder) is None
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert find_fault(folder, SIZES_ONLY) is None
        if find_fault(folder, slice(1, None)) is None:  # such as a date
            harmless += 1
            assert torch.equal(torch.load(file)["weight"], torch.arange(3.0, 67.0))
    assert harmless < 0.7 * len(whole)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert f"has {size} bytes, expected {len(whole)}" in str(find_fault(folder, SIZES_ONLY))
    (folder / LIST_FILE).unlink()  # as in a checkpoint of DeepSpeed
    assert "is damaged (File is not a zip file)" in str(find_fault(folder))
    file.write_bytes(whole)
    assert find_fault(folder) is None


def test_missing_files_and_lists_that_cannot_be_read_are_found(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    assert find_fault(tmp_path / "other") == f"{tmp_path / 'other'} is missing"
    for name in ("interlock_stage_00.pt", "note.txt"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert find_fault(folder, SIZES_ONLY) == f"{folder / name} is missing"
        (folder / name).write_bytes(content)
    (folder / LIST_FILE).write_text('{"step": 3, "fil')
    assert LIST_FILE in str(find_fault(folder, SIZES_ONLY))


def test_files_are_shared_out(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    size = (folder / "layer_00-model_states.pt").stat().st_size
    (folder / "layer_00-model_states.pt").write_bytes(bytes(size))
    assert [find_fault(folder, slice(rank, None, 3)) is None for rank in range(3)] == [True, False, True]


def test_the_oldest_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 4, "best")
    checkpoint(tmp_path, 200, "global_step200.unfinished")
    (tmp_path / "hf").mkdir()
    names = [folder.name for folder in newest_first(tmp_path)]
    assert names == ["best", "global_step100", "global_step10", "global_step9"]
    remove_oldest(tmp_path, "global_step", 2)
    assert [folder.name for folder in newest_first(tmp_path)] == ["best", "global_step100", "global_step10"]
    assert (tmp_path / "hf").is_dir()


def test_what_a_run_saves_after_it_went_back_is_the_newest(tmp_path: Path) -> None:
    for step in (100, 150, 200):
        list_file = checkpoint(tmp_path, step) / LIST_FILE
        listed = json.loads(list_file.read_text())
        del listed["number"]  # as an earlier version wrote it
        list_file.write_text(json.dumps(listed))
    for step, kept in ((120, {120, 200}), (2, {2, 120}), (120, {2, 120}), (140, {120, 140})):
        if step == 120:  # the engine replaces the one of this name
            shutil.rmtree(tmp_path / "global_step120", ignore_errors=True)
        newest = checkpoint(tmp_path, step)
        assert newest_complete(tmp_path, "global_step") == newest
        remove_oldest(tmp_path, "global_step", 2)
        assert {path.name for path in tmp_path.iterdir()} == {f"global_step{step}" for step in kept}
