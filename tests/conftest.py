"""Set-up for all tests: one thread for each process, so that ranks do not fight over cores.

Must run before torch is first imported: it reads these variables once.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a test needs is on this machine; a hub must not be asked for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from collections.abc import Iterator

import pytest
from hypothesis import settings
from ranks import RankPool

# Hypothesis's own profile for this: the same examples in every run, and no limit on their time.
settings.load_profile("ci")

POOLS = ("ranks4", "ranks5", "ranks2")
LONG = ("ranks4", "tests/launcher", "tests/experiments", "tests/benchmarks", "tests/commands", "tests/hf")
"""Groups of tests that take longest, in the order in which workers begin with them."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups tests for ``-n``: those of one pool of ranks run in one worker, the others by file."""
    groups: dict[pytest.Item, str] = {}
    for item in items:
        pools = [name for name in POOLS if name in getattr(item, "fixturenames", ())]
        groups[item] = (pools or [item.nodeid.partition("::")[0]])[0]
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    if hasattr(config, "workerinput"):  # long groups first: none is left to one worker at the end
        items.sort(
            key=lambda item: next((n for n, g in enumerate(LONG) if groups[item].startswith(g)), len(LONG))
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
