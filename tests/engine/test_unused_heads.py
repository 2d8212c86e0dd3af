"""Heads that a phase of the schedule does not use do not change, whatever the optimizer and its precision."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_jobs import BF16, BF16_ZERO_1, FP32_ZERO_1, Job, data_for, make_engine, make_module, parameters_of
from ranks import RankPool, caught
from test_frozen import assert_only_the_rest_learned, train_frozen
from test_phases import OPTIMIZERS, WIDENING, scheduled
from torch import Tensor

from ds_interlock import ConfigError


def masters_of_heads(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(p) if hasattr(p, "_hp_mapping") else p.detach().clone()
        for name, p in engine.module.heads.named_parameters()
    }


def heads_by_batch(job: Job) -> dict[str, Any]:
    return follow_heads(make_engine(job), job)


def follow_heads(engine: Any, job: Job) -> dict[str, Any]:
    data, heads, plans = data_for(engine, job), [], []
    for _ in range(job.num_batches):
        plans.append(engine.plan)
        engine.train_batch(data)
        engine.drain()
        heads.append(
            {n: (p, parameters_of(engine)[f"heads.{n}"]) for n, p in masters_of_heads(engine).items()}
        )
    numbers = {h.after_layer: str(n) for n, h in enumerate(engine.module.schedule.heads)}
    engine.destroy()
    return {"heads": heads, "plans": plans, "numbers": numbers}


def assert_heads_rest(results: Sequence[dict[str, Any]], num_batches: int) -> None:
    """From batch to batch those in use change, in value and master copy, and no others."""
    for result in results:
        in_use = [{result["numbers"][h.after_layer] for h in p.heads[:-1]} for p in result["plans"]]
        for batch in range(1, num_batches):
            for name, values in result["heads"][batch].items():
                earlier = result["heads"][batch - 1][name]
                same = [torch.equal(a, b) for a, b in zip(values, earlier, strict=True)]
                used = name.split(".")[0] in in_use[batch]
                assert same[0] == (not used), f"batch {batch}: {name}"
                assert used or same[1], f"batch {batch}: {name}"


@pytest.mark.parametrize(
    ("num_stages", "extra"),
    [(4, {}), (4, BF16_ZERO_1), (2, BF16), (2, FP32_ZERO_1)],
    ids=["fp32", "bf16, ZeRO 1", "2 replicas, bf16", "2 replicas, fp32, ZeRO 1"],
)
def test_a_head_that_is_not_in_use_does_not_change(ranks4: RankPool, num_stages, extra):
    """Under AdamW, which decays and moves by momentum whatever has a gradient, also one of zero."""
    phases = [
        {"from_step": 0, "window": 1},
        {"from_step": 2, "window": num_stages},
        {"from_step": 4, "window": 1},
    ]
    optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.3}}}
    job = Job(scheduled(phases), num_stages=num_stages, num_batches=6, extra=optimizer | extra)
    job.extra["optimizer"]["params"]["torch_adam"] = True
    assert_heads_rest(ranks4.run(heads_by_batch, job=job), job.num_batches)


def heads_by_batch_of_own_optimizer(job: Job) -> dict[str, Any]:
    import ds_interlock

    net = make_module(job)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.3)
    engine, *_ = ds_interlock.initialize(model=net, config=job.config(), optimizer=optimizer)
    return follow_heads(engine, job)


def test_nor_does_it_under_the_users_own_optimizer(ranks4: RankPool):
    job = Job(scheduled(WIDENING), num_batches=5)
    assert_heads_rest(ranks4.run(heads_by_batch_of_own_optimizer, job=job), job.num_batches)


@OPTIMIZERS
def test_a_stage_of_which_only_the_head_learns(ranks4: RankPool, extra):
    phases = [{"from_step": 0, "window": 1}, {"from_step": 2, "mode": "global"}]
    frozen = [0, 1, 2]
    for result in ranks4.run(
        train_frozen, job=Job(scheduled(phases), num_batches=4, extra=extra), frozen=frozen
    ):
        assert_only_the_rest_learned(result, frozen)
        assert ("placeholder" in result["after"]) == (result["stage"] == 0)


# What cannot be.


def refused(job: Job, own_optimizer: bool) -> str:
    import ds_interlock

    net = make_module(job)
    optimizer = torch.optim.AdamW(net.parameters()) if own_optimizer else None
    error = caught(ds_interlock.initialize, model=net, config=job.config(), optimizer=optimizer)
    assert isinstance(error, ConfigError)
    return str(error)


@pytest.mark.bad_input
def test_heads_cannot_rest_under_flat_copies_of_the_users_own_optimizer(ranks4: RankPool):
    job = Job(scheduled(WIDENING), extra=BF16)
    for message in ranks4.run(refused, job=job, own_optimizer=True):
        assert message.startswith("interlock.schedule: some phases do not use all heads; with bf16 or ZeRO")


@pytest.mark.bad_input
def test_ties_kept_in_step_with_zero_need_the_same_heads_throughout(ranks4: RankPool):
    job = Job(scheduled(WIDENING, tied_weights="sync"), tied=True, extra=FP32_ZERO_1)
    for message in ranks4.run(refused, job=job, own_optimizer=False):
        assert message.startswith(
            'interlock.tied_weights: "sync" cannot be combined with ZeRO and a schedule'
        )
