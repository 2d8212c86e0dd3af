"""Results are in the file whole or not at all, and files of another version are refused."""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ds_interlock.errors import DataError
from measuring import results_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "results" / "tiny.jsonl"


def test_what_was_appended_is_read_in_order(file: Path) -> None:
    assert results_file.read(file) == []
    for loss in (2.5, None, 1.5):
        results_file.append(file, {"final": {"loss": loss}})
    assert [record["final"]["loss"] for record in results_file.read(file)] == [2.5, None, 1.5]
    assert {record["format"] for record in results_file.read(file)} == {results_file.FORMAT}


def _append_some(file: Path, process: int) -> None:
    for number in range(10):
        results_file.append(file, {"process": process, "number": number, "padding": "x" * 5000})


def test_no_line_is_lost_when_processes_append_at_once(file: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        for job in [pool.submit(_append_some, file, process) for process in range(4)]:
            job.result()
    appended = [(record["process"], record["number"]) for record in results_file.read(file)]
    assert sorted(appended) == [(process, number) for process in range(4) for number in range(10)]


@pytest.mark.parametrize("bad", [float("nan"), object()])
def test_a_record_that_cannot_be_written_leaves_the_file_as_it_was(file: Path, bad: object) -> None:
    results_file.append(file, {"number": 1})
    before = file.read_bytes()
    with pytest.raises((ValueError, TypeError)):
        results_file.append(file, {"first": 1, "bad": bad})
    assert file.read_bytes() == before


def test_an_interrupted_write_leaves_the_file_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results_file.append(file, {"number": 1})
    before = file.read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)  # all but the last moment of the write
        with pytest.raises(KeyboardInterrupt):
            results_file.append(file, {"number": 2})
    assert file.read_bytes() == before
    results_file.append(file, {"number": 3})
    assert [record["number"] for record in results_file.read(file)] == [1, 3]


@pytest.mark.parametrize("line", ['{"format": 2, "number": 1}', "[1]"], ids=["newer", "a list"])
def test_another_version_is_refused_and_not_appended_to(file: Path, line: str) -> None:
    results_file.append(file, {"number": 0})
    text = file.read_text() + line + "\n"
    file.write_text(text)
    message = rf"tiny\.jsonl, line 2: format (2|None), expected {results_file.FORMAT}: .*other version"
    with pytest.raises(DataError, match=message):
        results_file.read(file)
    with pytest.raises(DataError, match=message):
        results_file.append(file, {"number": 3})
    assert file.read_text() == text


def test_a_line_that_was_cut_off_is_named(file: Path) -> None:
    results_file.append(file, {"number": 0})
    file.write_text(file.read_text() + json.dumps({"format": 1, "number": 1})[:-3] + "\n")
    with pytest.raises(DataError, match=r"line 2: not JSON .*remove the line"):
        results_file.read(file)


def test_a_line_without_a_format_is_of_the_first(file: Path) -> None:
    file.parent.mkdir()
    file.write_text('{"mode": "global"}\n')
    assert results_file.read(file) == [{"mode": "global"}]
