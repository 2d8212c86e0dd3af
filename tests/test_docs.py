"""The pages: links lead somewhere, what they name exists, and the README stays short."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MOST_WORDS = 1000

LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"(?:python -m|--module) ((?:ds_interlock|benchmarks|experiments)[.\w]*)")
NAME = re.compile(r"`(ds_interlock\.[\w.]*\w)")
PATH = re.compile(r"\b((?:launcher|configs|tests|benchmarks|experiments|ds_interlock)/[\w/]+\.\w+)")

NUMBER = re.compile(r"\d+(?:\.\d+)?")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@each_page
def test_commands_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in MODULE.findall(text):
        assert _module(module), module
    for path in PATH.findall(text.replace("/NAME.", "/*.")):
        assert (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_names_of_the_package_exist(page: Path) -> None:
    for name in NAME.findall(page.read_text(encoding="utf-8")):
        owner, _, attribute = name.rpartition(".")
        source = _module(name) or _module(owner)
        assert source, name
        assert _module(name) or re.search(rf"\b{attribute}\b", source.read_text(encoding="utf-8")), name


def test_each_row_of_what_a_script_may_do_names_its_tests() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    rows = page.split("| a script may |")[1].split("\n\n")[0].split("\n")[2:]
    assert len(rows) > 40
    for row in rows:
        tests = re.findall(r"`([^`]+)`", row.rstrip("| ").rpartition("|")[2])
        assert tests, row
        assert all((ROOT / "tests" / f"{name}.py").is_file() for name in tests), row


def test_the_readme_is_short_and_lists_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= MOST_WORDS
    assert {f"docs/{page.name}" for page in PAGES if page.parent != ROOT} <= set(LINK.findall(readme))


@pytest.mark.parametrize(
    ("heading", "page", "section"),
    [
        ("Is it faster for my job?", "benchmarks.md", "| K = 8 |"),
        ("Does it learn as well?", "results.md", "## Transformer language model, 8 stages"),
    ],
)
def test_the_numbers_of_the_readme_are_those_of_the_pages(heading: str, page: str, section: str) -> None:
    quoted = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    source = (ROOT / "docs" / page).read_text(encoding="utf-8").split(section)[1].split("\n## ")[0]
    source = source.split("\n| K = ")[0]
    rows = [row for row in _rows(quoted) if NUMBER.findall(" ".join(row[1:]))][1:]
    assert len(rows) >= 3
    for name, *cells in rows:
        known = [number for row in _rows(source) if row[0] in name for number in NUMBER.findall(str(row))]
        assert set(NUMBER.findall(" ".join(cells))) <= set(known), name


def test_the_speeds_are_those_of_the_results_file() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "docs" / "benchmarks" / "pipeline_peers.json").read_text(encoding="utf-8"))
    for stages in results["arguments"]["stages"]:
        _, *rows = _rows(f"| K = {stages} |" + page.split(f"| K = {stages} |")[1].split("\n\n")[0])
        for engine, *cells in rows:
            measured = [r for r in results["rows"] if (r["stages"], r["engine"]) == (stages, engine)]
            speeds = [f"{row['times_deepspeed']:.2f}" if "seconds" in row else "–" for row in measured]
            assert cells == speeds or not measured, (stages, engine)


def test_the_picture_of_the_timelines_is_what_its_command_draws(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "docs").mkdir()
    env = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=60)
    drawn = (tmp_path / "docs" / "timelines.svg").read_text(encoding="utf-8")
    committed = (ROOT / "docs" / "timelines.svg").read_text(encoding="utf-8")
    assert drawn == committed, "draw docs/timelines.svg again: the code is in docs/planning.md"


def _module(name: str) -> Path | None:
    """The file of a module or package of this repository; None if it does not exist."""
    path = ROOT.joinpath(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.exists()), None)


def _rows(text: str) -> list[list[str]]:
    """The rows of all tables, cell by cell."""
    return [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
