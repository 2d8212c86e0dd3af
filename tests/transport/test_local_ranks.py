"""Local ranks: results and reports, errors and deaths, a time limit, and no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_interlock.transport.local_ranks import RankError, report, run_local_ranks


def rank_and_report(base: int) -> tuple[int, str]:
    rank = int(os.environ["RANK"])
    report((rank, "half way"))
    return base + rank, os.environ["LOCAL_RANK"]


def fail_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        raise ValueError("first")
    os._exit(3)


def fail_late_or_never() -> None:
    rank = int(os.environ["RANK"])
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(3.0 * rank)
    raise ValueError(f"rank {rank}")


def sleep_with_a_note(folder: str) -> None:
    (Path(folder) / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_results_and_reports(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # which two ranks share
    reports: list[Any] = []
    results = run_local_ranks(partial(rank_and_report, 10), 2, device=device, on_report=reports.append)
    assert results == [(10, "0"), (11, "1" if device == "cpu" else "0")]
    assert sorted(reports) == [(0, "half way"), (1, "half way")]


def test_a_rank_that_died_is_named_first() -> None:
    with pytest.raises(RankError, match="rank 1 failed\nthe process died with status 3") as error:
        run_local_ranks(fail_on_rank_0, 2)
    assert {rank: failure.reason for rank, failure in error.value.failures.items()} == {
        1: "the process died with status 3",
        0: "ValueError: first",
    }


def test_failed_ranks_have_time_to_say_why_and_stopped_ones_are_not_waited_for() -> None:
    with pytest.raises(RankError) as error:
        run_local_ranks(fail_late_or_never, 3, grace_seconds=600.0)
    assert {rank: failure.reason for rank, failure in error.value.failures.items()} == {
        0: "ValueError: rank 0",
        1: "ValueError: rank 1",
    }


def test_ranks_end_when_the_time_is_up_and_show_what_they_wait_for(tmp_path: Path) -> None:
    run_local_ranks(partial(rank_and_report, 0), 2)  # the server has started after this
    others = set(multiprocessing.active_children())
    with pytest.raises(TimeoutError, match=r"end of the log of rank 1[^-]*in sleep_with_a_note"):
        run_local_ranks(partial(sleep_with_a_note, str(tmp_path)), 2, timeout_seconds=4.0)
    assert set(multiprocessing.active_children()) <= others


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "from functools import partial; from test_local_ranks import *\n"
        "torch.cuda.device_count = lambda: 1\n"
        f"work = partial(sleep_with_a_note, {str(tmp_path)!r})\n"
        "if __name__ == '__main__': run_local_ranks(work, 2, device='cuda')"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    starter = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    try:
        _until(lambda: all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"))
        ranks = [int((tmp_path / rank).read_text()) for rank in "01"]
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        _until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    finally:
        starter.kill()


def _until(condition: Any, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in time"
        time.sleep(0.1)
