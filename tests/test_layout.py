"""The imports point one way: ``hf -> pipe -> schedule``; and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ds_interlock"

# What the files of a folder must not import. `schedule` is pure Python: it plans without a GPU library.
FORBIDDEN = {
    "schedule": (
        "torch",
        "deepspeed",
        "transformers",
        "numpy",
        *(f"ds_interlock.{n}" for n in ("pipe", "hf")),
    ),
    "planning": (
        "torch",
        "deepspeed",
        "transformers",
        "numpy",
        *(f"ds_interlock.{n}" for n in ("pipe", "hf")),
    ),
    "pipe": ("transformers", "ds_interlock.hf", "ds_interlock.models"),
    "models": ("ds_interlock.hf", "ds_interlock.pipe"),
    "images": ("transformers", "ds_interlock.pipe"),
}
PURE = ("ds_interlock", "ds_interlock.errors", "ds_interlock.config")

BLOCK_TORCH = """
import importlib, sys
for name in ("torch", "deepspeed", "transformers"):
    sys.modules[name] = None  # any import of it now raises ImportError
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def imports(path: Path) -> set[str]:
    """Full names of all that the file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write ds_interlock. ..."
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder: str) -> None:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files, f"{folder} is empty: nothing was checked"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imports(path))
        if any(name == forbidden or name.startswith(f"{forbidden}.") for forbidden in FORBIDDEN[folder])
    ]
    assert not wrong


def test_planning_needs_no_torch() -> None:
    modules = [
        f"ds_interlock.{folder}.{path.stem}"
        for folder in ("schedule", "planning")
        for path in sorted((PACKAGE / folder).glob("[!_]*.py"))
    ]
    assert "ds_interlock.schedule.plan" in modules
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH, *PURE, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_no_file_is_longer_than_one_concept(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
