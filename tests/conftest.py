"""Set-up for all tests: one thread for each process, so that ranks do not fight over cores.

Must run before torch is first imported: it reads these variables once.
"""

import atexit
import gc
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a test needs is on this machine; a hub must not be asked for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# What tests tokenise is not for the cache of the user. Workers and ranks get it from here.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

from collections.abc import Iterator

import pytest
from hypothesis import settings
from ranks import RankPool, start_server

# Hypothesis's own profile for this: the same examples in every run, and no limit on their time.
settings.load_profile("ci")

LONG = [
    f"tests/{room}/" for room in ("launcher", "jobs", "engine", "experiments", "benchmarks", "commands", "hf")
]
"""Where the tests are that take longest."""


def pytest_configure(config: pytest.Config) -> None:
    """With ``-n``, the server of ranks starts while tests are collected: every worker will need it."""
    if hasattr(config, "workerinput"):
        start_server()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``-n``, files of long tests come first: so no worker is left with one of them at the end."""
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: next((n for n, room in enumerate(LONG) if room in item.nodeid), len(LONG))
        )


def pytest_collection_finish() -> None:
    """Spares every later garbage collection the modules that tests have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two ranks that stay up over all tests."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four ranks that stay up over all tests."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks5() -> Iterator[RankPool]:
    """Five ranks that stay up over all tests."""
    with RankPool(5) as pool:
        yield pool
