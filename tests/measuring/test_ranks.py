"""``run_ranks``: results by rank, and failures that say where and why."""

import os

import pytest
import torch
import torch.distributed as dist

from ds_interlock.transport.local_ranks import RankError
from measuring.engines import run_ranks


def share(base: int) -> tuple[int, int, int]:
    total = torch.tensor(base + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.getpid()


def fail_on_rank_1(how: str) -> None:
    if dist.get_rank() == 1:
        print("last words")
        if how == "dies":
            os._exit(3)
        raise ValueError("this rank is out of luck")
    dist.barrier()  # rank 0 would wait for ever


def test_results_come_by_rank_and_processes_are_new() -> None:
    first, second = (run_ranks(share, 2, base=10) for _ in range(2))
    assert [result[:2] for result in first] == [(0, 21), (1, 21)]
    assert len({pid for _, _, pid in [*first, *second]} - {os.getpid()}) == 4


@pytest.mark.parametrize(
    ("how", "says"), [("raises", "this rank is out of luck"), ("dies", "died with status 3")]
)
def test_a_failure_says_on_which_rank_and_why(how: str, says: str) -> None:
    with pytest.raises(RankError, match=rf"rank 1 failed\n[\s\S]*{says}"):
        run_ranks(fail_on_rank_1, 2, how=how)
