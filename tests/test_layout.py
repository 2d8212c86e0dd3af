"""Where things are: imports go one way and never in a circle, planning needs no torch, rooms are small."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ds_interlock"

# What a folder may import of the others, besides `errors` and `files`.
MAY_IMPORT = {
    "schedule": set(),
    "config": {"schedule"},
    "planning": {"config", "schedule"},
    "transport": {"schedule", "stage"},
    "stage": {"sampling", "schedule"},
    "heads": {"config", "schedule", "stage"},
    "checkpoints": set(),
    "models": {"heads", "schedule"},
    "engine": {"checkpoints", "config", "heads", "schedule", "stage", "transport"},
    "profiling": {"config", "heads", "planning", "schedule", "transport"},
    "hf/data": {"heads", "sampling"},
    "hf/model": {"config", "heads", "hf/data", "planning", "profiling", "sampling", "schedule", "transport"},
    "hf/export": {"checkpoints", "heads", "hf/model", "models", "schedule"},
    "images": {"heads", "hf/data", "sampling"},
    "jobs": {"checkpoints", "config", "hf/data", "hf/export", "hf/model", "images", "models", "transport"},
    "verification": {"config", "heads", "sampling", "schedule", "stage", "transport"},
}
# What each tree may import of the others.
TREE_MAY_IMPORT = {
    "ds_interlock": set(),
    "measuring": {"ds_interlock"},
    "benchmarks": {"ds_interlock", "measuring"},
    "experiments": {"ds_interlock", "measuring"},
}
# These plan without a GPU library.
PURE = ("errors", "files", "config", "schedule", "planning")
GPU_LIBRARIES = ("torch", "deepspeed", "transformers", "numpy")

TREES = ("ds_interlock", "measuring", "benchmarks", "experiments")
MOST_FILES = 16  # 15 and an __init__
MOST_LINES = 400


def test_imports_go_one_way() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, all_imported in graph().items()
        for imported in sorted(all_imported)
        if tree(module) == "ds_interlock"
        and room(module) in MAY_IMPORT
        and imported.startswith("ds_interlock")
        and room(imported) not in MAY_IMPORT[room(module)] | {room(module), "errors", "files"}
    ]
    assert not wrong


def test_trees_import_one_way() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, all_imported in graph().items()
        for imported in sorted(all_imported)
        if tree(imported) not in TREE_MAY_IMPORT[tree(module)] | {tree(module)}
    ]
    assert not wrong
    assert set(TREE_MAY_IMPORT) == set(TREES)


def test_every_folder_of_the_package_has_its_rule() -> None:
    folders = {room(module) for module in graph() if module.startswith("ds_interlock.")}
    assert folders - set(MAY_IMPORT) == {"cli", "commands", "errors", "files", "sampling"}
    assert set(MAY_IMPORT) <= folders


def test_design_md_lists_every_folder_below_those_that_it_imports() -> None:
    layout = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## 6. Layout")[1]
    listed = re.findall(r"^\| `([\w/]+)` \| ", layout, re.MULTILINE)
    folders = [path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py")]
    assert sorted(listed) == sorted(set(folders) - {"."})
    for number, folder in enumerate(listed):
        assert MAY_IMPORT.get(folder, set()) - {"sampling"} <= set(listed[:number]), folder


def test_nothing_imports_in_a_circle() -> None:
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_planning_needs_no_torch() -> None:
    modules = [module for module in graph() if room(module) in PURE]
    assert "ds_interlock.schedule.plan" in modules
    code = (
        "import importlib, sys\n"
        f"for name in {GPU_LIBRARIES}: sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "ds_interlock", *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_imported_is_required() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = _projects(setup["options"]["install_requires"])
    extras = _projects(setup["options.extras_require"]["qlora"])
    for path in PACKAGE.rglob("*.py"):
        code = ast.parse(path.read_text(encoding="utf-8"))
        at_once = _third_party(_imports_in(code.body))
        assert at_once <= required, path
        assert _third_party(_imports(path)) <= required | extras, path


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_files_and_folders_are_small() -> None:
    paths = [path for tree in TREES for path in (ROOT / tree).rglob("*.py")]
    for folder in {path.parent for path in paths}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder
        assert (folder / "__init__.py").read_text().startswith('"""'), f"{folder} does not say what it is"
    for path in paths:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, path


@cache
def graph() -> dict[str, frozenset[str]]:
    """The modules of this repository that each of them imports, wherever in its file."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for tree in TREES
        for path in (ROOT / tree).rglob("*.py")
        if path.stem != "__init__"  # hands out names of its folder, which do not import it
    }
    # Not itself: the function that a new process starts with is looked up by the name of its module.
    return {module: frozenset((_imports(path) & set(paths)) - {module}) for module, path in paths.items()}


def tree(module: str) -> str:
    """The folder at the top that a module is in."""
    return module.split(".")[0]


def room(module: str) -> str:
    """The folder of a module of the package, or its name if it stands alone."""
    parts = module.split(".")[1:]
    return "/".join(parts[:-1]) or parts[-1]


def _projects(requirements: str) -> set[str]:
    """The names in some lines of requirements."""
    return set(re.findall(r"^([\w-]+)", requirements, re.MULTILINE))


def _third_party(modules: set[str]) -> set[str]:
    names = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"ds_interlock"}
    return {name.replace("_", "-") for name in names}


def _imports(path: Path) -> set[str]:
    return _imports_in(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _imports_in(nodes: Iterable[ast.AST]) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            assert node.module is not None
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found
