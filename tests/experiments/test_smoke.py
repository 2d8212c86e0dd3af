"""``python -m experiments.run smoke``: every experiment in short, from its data to the report."""

from pathlib import Path

import pytest

from experiments import definition, run, smoke


def test_smoke_runs_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(["smoke"]) == 0
    page = (smoke.FOLDER / "results.md").read_text(encoding="utf-8")
    for name in definition.names():
        found = definition.load(name)
        assert f"## {found.title}" in page
        section = page.split(f"## {found.title}")[1].split("\n## ")[0]
        for mode in found.modes:
            assert f"| {mode} |" in section
        assert "Not run yet" not in section
        assert (smoke.FOLDER / "results" / f"smoke-{name}_curves.svg").stat().st_size > 0
