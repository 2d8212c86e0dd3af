"""Heads that read with copies of the live unembedding: the same bits however the copies travel."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16_ZERO_1,
    Job,
    Outcome,
    assert_same,
    data_for,
    layers,
    loss_fn,
    make_engine,
    micro_batches,
    parameters_of,
    train,
)
from nccl_rules import nccl_rules
from ranks import RankPool, caught
from torch import Tensor

from ds_interlock import InProcessPipeline, InterlockConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.schedule.action import Kind

NUM_BATCHES = 7


def shared(refresh_every: int, **section: Any) -> dict[str, Any]:
    head = {"type": "shared", "refresh_every": refresh_every}
    return {"mode": "local", **section, "head": head}


def phases(refresh_every: int) -> dict[str, Any]:
    steps = [{"from_step": 0, "mode": "local"}, {"from_step": 3, "window": 1.5}]
    return {"schedule": steps, "head": shared(refresh_every)["head"]}


JOBS = {
    "every batch": Job(shared(1), num_micro_batches=2, num_batches=NUM_BATCHES),
    "phases, tied": Job(phases(3), num_micro_batches=2, num_batches=NUM_BATCHES, tied=True),
    "replicas, bf16, ZeRO 1": Job(
        shared(2), num_stages=2, num_micro_batches=2, num_batches=NUM_BATCHES, extra=BF16_ZERO_1
    ),
}


def train_in_two_ways(job: Job) -> list[Outcome]:
    """Batch by batch; streaming, under NCCL's rules, with an evaluation and a flush on the way of a copy."""
    batch_by_batch = train(job.but(section={**(job.section or {}), "streaming": False}))
    with nccl_rules():
        engine = make_engine(job)
    data = data_for(engine, job)
    for batch in range(job.num_batches):
        engine.train_batch(data)
        if batch == 3:
            engine.eval_batch(iter(micro_batches(2)))
            engine.drain()
    outcome = Outcome([], float(engine.drain()), parameters_of(engine))
    engine.destroy()
    return [batch_by_batch, outcome]


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_when_copies_travel_changes_no_bit(ranks4: RankPool, job: Job) -> None:
    batch_by_batch, streaming = zip(*ranks4.run(train_in_two_ways, job=job), strict=True)
    assert_same(batch_by_batch, streaming)


def train_with_history(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    before, data = parameters_of(engine), data_for(engine, job)
    for _ in range(job.num_batches):
        engine.train_batch(data)
    loss = float(engine.drain())
    return {"before": before, "after": parameters_of(engine), "loss": loss, "plan": engine.plan}


def test_four_processes_against_one(ranks4: RankPool) -> None:
    """Layers of torch's own are drawn again for heads: these read with the model's even so."""
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "gradient_clipping": 0.0}
    job = Job(shared(2, mode="interlock"), num_batches=NUM_BATCHES, num_micro_batches=2, extra=sgd)
    on_ranks = ranks4.run(train_with_history, job=job)
    before = {name: value for result in on_ranks for name, value in result["before"].items()}
    specs, config = layers(), InterlockConfig.from_deepspeed(job.config())
    net = InProcessPipeline(
        [spec.build() for spec in specs], loss_fn, on_ranks[0]["plan"], head_factory(config.head, specs)
    )
    net.load_state_dict(before, strict=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    batches = micro_batches(2 * NUM_BATCHES)
    for step in range(NUM_BATCHES):
        losses = net.accumulate_gradients(batches[2 * step : 2 * step + 2])
        optimizer.step()
        optimizer.zero_grad()
    expected: dict[str, Tensor] = net.state_dict()
    for result in on_ranks:
        assert result["loss"] == pytest.approx(float(losses[net.plan.final]), rel=1e-5)
        for name, after in result["after"].items():
            torch.testing.assert_close(after, expected[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(after, before[name]), f"{name} has not changed"


def save_and_resume(job: Job, folder: str) -> tuple[Outcome, Outcome, dict[str, Any]]:
    """Undisturbed; resumed where a copy is under way, in an engine with another one under way."""
    engine = make_engine(job)
    data = data_for(engine, job)
    for _ in range(4):
        engine.train_batch(data)
    engine.save_checkpoint(folder)
    state = copy.deepcopy(engine.module.copies.state())
    for _ in range(3):
        engine.train_batch(data)
    undisturbed = Outcome([], float(engine.drain()), parameters_of(engine))
    engine.destroy()
    engine = make_engine(job)
    engine.train_batch(data_for(engine, job))
    engine.load_checkpoint(folder)
    data = data_for(engine, job)
    for _ in range(4 * job.num_micro_batches):
        next(data, None)
    for _ in range(3):
        engine.train_batch(data)
    resumed = Outcome([], float(engine.drain()), parameters_of(engine))
    engine.destroy()
    return undisturbed, resumed, state


def load_elsewhere(job: Job, folder: str) -> dict[str, Any]:
    engine = make_engine(job)
    engine.train_batch(data_for(engine, job))
    engine.load_checkpoint(folder)
    copies = engine.module.copies
    state, live = copy.deepcopy(copies.state()), copies._live and copies._live()[0].detach().clone()
    engine.train_batch(data_for(engine, job))
    engine.drain()
    engine.destroy()
    return {"state": state, "live": live}


def test_a_run_resumes_bit_for_bit_and_under_another_cut_with_its_copies(
    ranks4: RankPool, tmp_path: Path
) -> None:
    job = Job(shared(3), num_micro_batches=2, num_batches=NUM_BATCHES)
    undisturbed, resumed, states = zip(
        *ranks4.run(save_and_resume, job=job, folder=str(tmp_path)), strict=True
    )
    assert_same(undisturbed, resumed)
    saved = states[0]
    assert not torch.equal(saved["in_use"][0], saved["next"][0])
    elsewhere = ranks4.run(load_elsewhere, job=job.but(num_stages=2), folder=str(tmp_path))
    for name in ("in_use", "next"):
        for part, expected in zip(elsewhere[0]["state"][name], saved[name], strict=True):
            assert torch.equal(part, expected)


def save_global(job: Job, folder: str) -> None:
    engine = make_engine(job)
    engine.train_batch(data_for(engine, job))
    engine.save_checkpoint(folder)
    engine.destroy()


@pytest.mark.parametrize("section", [None, {"mode": "global"}], ids=["DeepSpeed's", "ours"])
def test_a_checkpoint_without_copies_gives_its_live_unembedding(
    ranks4: RankPool, tmp_path: Path, section: dict[str, Any] | None
) -> None:
    job = Job(section, num_micro_batches=2)
    ranks4.run(save_global, job=job, folder=str(tmp_path))
    *heads, last = ranks4.run(load_elsewhere, job=job.but(section=shared(3)), folder=str(tmp_path))
    for result in heads:
        assert torch.equal(result["state"]["in_use"][0], last["live"])


def silent_neighbour() -> str:
    """The last stage does nothing, until the first one has told of it."""
    engine = make_engine(Job(shared(2, timeout_seconds=3.0), num_stages=2, num_micro_batches=1))
    store = torch.distributed.distributed_c10d._get_default_store()
    if engine.is_last_stage():
        store.wait(["told"])
        return ""
    error = caught(engine.train_batch, data_for(engine, Job(None)))
    store.set("told", "")
    return str(error)


def test_a_stage_that_sends_no_copy_is_named() -> None:
    with RankPool(2) as pool:
        told, _ = pool.run(silent_neighbour)
    assert "stage 1 (rank 1) sent nothing for 3 s while 0RECV_C0 was due" in told


def channels_when_frozen(job: Job) -> tuple[bool, set[Kind]]:
    from engine_jobs import make_module

    import ds_interlock

    net = make_module(job)
    for name, parameter in net.named_parameters():
        if name.startswith("10."):
            parameter.requires_grad_(False)
    engine, *_ = ds_interlock.initialize(model=net, config=job.config())
    engine.train_batch(data_for(engine, job))
    engine.drain()
    channels = set(engine._runner.links.channels)
    engine.destroy()
    return engine.module.copies is None, channels


def test_nothing_is_sent_where_the_unembedding_is_frozen_or_the_mode_is_global(ranks4: RankPool) -> None:
    job = Job(shared(1), num_micro_batches=2)
    for changed in (job, job.but(section={**shared(1), "mode": "global"})):
        for has_none, channels in ranks4.run(channels_when_frozen, job=changed):
            assert has_none
            assert not channels & {Kind.SEND_COPY, Kind.RECV_COPY}
