"""Set-up for all tests: one thread for each process, so that ranks do not fight over cores.

Must run before torch is first imported: it reads these variables once.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a test needs is on this machine; a hub must not be asked for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from collections.abc import Iterator

import pytest
from ranks import RankPool

POOLS = ("ranks2", "ranks4", "ranks5")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups tests for ``-n``: those of one pool of ranks run in one worker, the others by file."""
    for item in items:
        pools = [name for name in POOLS if name in getattr(item, "fixturenames", ())]
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group("+".join(pools) or item.nodeid.partition("::")[0]))


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
