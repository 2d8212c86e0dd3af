"""Checkpoints that are written while training goes on: what was saved, complete or not there, faults told."""

import os
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engine_jobs import BF16_ZERO_1, Job, data_for, make_engine, parameters_of
from ranks import RankError, RankPool

from ds_interlock.checkpoints import background

SECTION = {"mode": "interlock", "window": 2, "async_save": True}


def save_and_train_on(job: Job, folder: str) -> tuple[bool, bool, bool]:
    """Whether it was complete before training went on, and after ``drain``; whether it is what was saved."""
    engine, trained = make_engine(job), threading.Event()
    data = data_for(engine, job)
    engine.train_batch(data)
    engine.drain()
    saved = parameters_of(engine)
    write = background._write

    def write_later(*what: Any) -> None:
        trained.wait(60)
        write(*what)

    with patch.object(background, "_write", write_later):
        engine.save_checkpoint(folder)
        engine.train_batch(data)
        was_complete = Path(folder, "latest").exists()
        trained.set()
        engine.drain()
    is_complete = Path(folder, "latest").read_text() == "global_step1"
    moved = any(not torch.equal(saved[name], value) for name, value in parameters_of(engine).items())
    engine.load_checkpoint(folder)
    same = all(torch.equal(saved[name], value) for name, value in parameters_of(engine).items())
    engine.destroy()
    return was_complete, is_complete, moved and same


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16, ZeRO 1"])
def test_training_goes_on_while_a_checkpoint_is_written(ranks4: RankPool, tmp_path: Path, extra: Any) -> None:
    job = Job(SECTION, num_stages=2, num_batches=2, extra=extra)
    results = ranks4.run(save_and_train_on, job=job, folder=str(tmp_path))
    assert results == [(False, True, True)] * 4
    assert not list(tmp_path.glob("*unfinished*"))


def write_nothing(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def fail_to_write(folder: str) -> None:
    job = Job({**SECTION, "timeout_seconds": 10}, num_stages=2)
    engine = make_engine(job)
    if os.environ["RANK"] == "1":
        background._write = write_nothing
    engine.train_batch(data_for(engine, job))
    engine.save_checkpoint(folder)
    engine.drain()


def test_a_disk_that_is_full_is_told_by_all(tmp_path: Path) -> None:
    with RankPool(2) as pool, pytest.raises(RankError) as error:
        pool.run(fail_to_write, folder=str(tmp_path))
    reasons = {rank: failure.message for rank, failure in error.value.failures.items()}
    assert "No space left on device" in reasons[0]
    assert "No space left on device" in reasons[1]
    assert not (tmp_path / "latest").exists()
