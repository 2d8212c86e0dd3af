"""docs/results.md and the planner say what the results files in the repository say."""

import re
import shutil
from pathlib import Path

import pytest

from ds_interlock.planning import quality
from experiments import definition, figures, report
from experiments.definition import Run
from measuring import results_file

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = [name for name in definition.names() if (DOCS / "experiments" / f"{name}.jsonl").exists()]


def test_the_page_is_made_from_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save", lambda figure, path: None)  # test_report.py writes pictures
    shutil.copytree(DOCS / "experiments", tmp_path / "experiments")
    report.write(tmp_path / "experiments", tmp_path / "results.md", tmp_path / "measured.json")
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()
    assert (tmp_path / "measured.json").read_text() == quality.FILE.read_text(), "run experiments.report"


def test_the_pictures_of_the_page_are_there() -> None:
    pictures = re.findall(r"!\[.*\]\((.*)\)", (DOCS / "results.md").read_text())
    assert pictures
    assert all((DOCS / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_result_is_of_a_run_that_is_defined(name: str) -> None:
    """A definition that changes after its runs leaves results of something else."""
    runs = definition.load(name).runs(name)
    for record in results_file.read(DOCS / "experiments" / f"{name}.jsonl"):
        assert Run.model_validate(record["run"]) in runs
