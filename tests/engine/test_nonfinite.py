"""A nan in the loss of one stage: an error there, or a step that is left out."""

from typing import Any

import pytest
import torch
from engine_jobs import BF16_ZERO_1, FP32_ZERO_1, Job, data_for, loss_fn, make_engine, parameters_of
from ranks import RankPool, caught
from torch import Tensor

from ds_interlock.errors import NonfiniteError, PeerError

BAD_BATCH = 2
NAN_ON_RANK = 1


def train_with_nan(job: Job) -> tuple[Exception | None, list[bool], int]:
    """The error, whether the weights changed in each batch, and how many steps were left out."""
    num_calls = 0

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        bad = num_calls == (BAD_BATCH - 1) * job.num_micro_batches + 1 and engine.global_rank == NAN_ON_RANK
        return loss_fn(logits, labels) * (torch.nan if bad else 1.0)

    engine = make_engine(job, loss_fn=loss)
    data = data_for(engine, job)
    error, changed = None, []
    for _ in range(job.num_batches):
        before = parameters_of(engine)
        error = error or caught(engine.train_batch, data)
        after = parameters_of(engine)
        changed.append(any(not torch.equal(before[name], after[name]) for name in before))
    assert error or all(p.isfinite().all() for p in engine.module.parameters())
    torch.distributed.barrier()
    return error, changed, engine.skipped_steps


def run(pool: RankPool, section: dict[str, Any], **job: Any) -> list[Any]:
    section = {"timeout_seconds": 5.0, **section}
    return pool.run(train_with_nan, job=Job(section, 2, num_micro_batches=2, num_batches=3, **job))


@pytest.mark.parametrize("extra", [{}, FP32_ZERO_1, BF16_ZERO_1], ids=["fp32", "ZeRO 1", "bf16 ZeRO 1"])
@pytest.mark.parametrize("mode", ["local", "global"])
def test_steps_that_are_left_out(ranks2: RankPool, mode: str, extra: dict[str, Any]) -> None:
    upstream, downstream = run(ranks2, {"mode": mode, "nonfinite": "skip"}, extra=extra)
    assert downstream == (None, [True, False, True], 1)
    assert upstream == (downstream if mode == "global" else (None, [True, True, True], 0))


def test_all_stages_leave_out_a_step_that_they_take_together(ranks2: RankPool) -> None:
    section = {"mode": "local", "tied_weights": "sync", "nonfinite": "skip"}
    assert run(ranks2, section, tied=True) == [(None, [True, False, True], 1)] * 2


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16 ZeRO 1"])
def test_an_error_on_the_stage_that_has_it(ranks2: RankPool, extra: dict[str, Any]) -> None:
    (upstream, *_), (error, changed, _) = run(ranks2, {"mode": "local"}, extra=extra)
    assert isinstance(error, NonfiniteError)
    assert 'interlock.nonfinite "skip"' in str(error)
    assert error.__notes__ == ["on stage 1 (rank 1), in batch 2"]
    assert changed[:2] == [True, False]
    assert upstream is None or isinstance(upstream, PeerError)
