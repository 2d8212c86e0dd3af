"""Frozen layers: they stay as they are, gradients flow through them, and a stage may be frozen as a whole."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16,
    BF16_ZERO_1,
    FP32_ZERO_1,
    Job,
    data_for,
    layers,
    loss_fn,
    make_module,
    micro_batches,
    parameters_of,
)
from ranks import RankPool
from torch import Tensor

from ds_interlock import InProcessPipeline, InterlockConfig
from ds_interlock.heads.factory import head_factory

GLOBAL = {"mode": "global"}
LOCAL = {"mode": "local"}
INTERLOCK = {"mode": "interlock", "window": 2, "head": {"weight": 0.7}}
FRACTIONAL = {**INTERLOCK, "window": 1.5}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.3}}, "gradient_clipping": 0.0}
# Of 11 layers in 4 stages: 0-2, 3-5, 6-8, 9-10.
STAGES = {
    "first": [0, 1, 2],
    "middle": [3, 4, 5],
    "both": [0, 1, 2, 6, 7, 8],
    "last": [9, 10],
    "some": [0, 4, 9],
}


def frozen_engine(job: Job, frozen: Sequence[int]) -> Any:
    """The engine of ``job``, some layers of which have been frozen after the module was built."""
    import deepspeed

    import ds_interlock

    net = make_module(job)
    for name, parameter in net.named_parameters():
        if name.split(".")[0] in map(str, frozen) or (job.tied and name.startswith("tied_modules.")):
            parameter.requires_grad_(False)
    initialize = deepspeed.initialize if job.section is None else ds_interlock.initialize
    engine, *_ = initialize(
        model=net,
        config=job.config(),
        model_parameters=None
        if job.section is not None
        else [p for p in net.parameters() if p.requires_grad],
    )
    torch.manual_seed(900 + engine.global_rank)
    return engine


def train_frozen(job: Job, frozen: Sequence[int]) -> dict[str, Any]:
    engine = frozen_engine(job, frozen)
    before = parameters_of(engine)
    data = data_for(engine, job)
    losses = [float(engine.train_batch(data)) for _ in range(job.num_batches)]
    loss = float(engine.drain()) if job.section is not None else losses[-1]
    result = {"before": before, "after": parameters_of(engine), "loss": loss, "stage": engine.stage_id}
    result["plan"] = engine.plan if job.section is not None else None
    engine.destroy()
    return result


def of_layer(name: str, frozen: Sequence[int]) -> bool:
    return name.split(".")[0] in map(str, frozen)


def assert_only_the_rest_learned(result: dict[str, Any], frozen: Sequence[int]) -> None:
    for name, after in result["after"].items():
        if of_layer(name, frozen) or name == "placeholder":
            assert torch.equal(after, result["before"][name]), name
        else:
            assert not torch.equal(after, result["before"][name]), name


def trained_in_one_process(
    job: Job, results: list[dict[str, Any]], frozen: Sequence[int]
) -> tuple[dict[str, Tensor], float]:
    specs, plan = layers(), results[0]["plan"]
    head = head_factory(InterlockConfig.from_deepspeed(job.config()).head, specs)
    built = [spec.build() for spec in specs]
    for number in frozen:
        built[number].requires_grad_(False)
    net = InProcessPipeline(built, loss_fn, plan, head)
    start = {name: p for result in results for name, p in result["before"].items() if name != "placeholder"}
    net.load_state_dict(start)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.3)
    data = micro_batches(job.num_batches * job.num_micro_batches)
    for batch in range(job.num_batches):
        optimizer.zero_grad()
        some = data[batch * job.num_micro_batches : (batch + 1) * job.num_micro_batches]
        losses = net.accumulate_gradients(some)
        optimizer.step()
    return dict(net.named_parameters()), float(losses[plan.final])


@pytest.mark.parametrize("section", [GLOBAL, LOCAL, INTERLOCK], ids=["global", "local", "window 2"])
@pytest.mark.parametrize("where", STAGES)
def test_the_rest_learns_as_in_one_process(ranks4: RankPool, where: str, section: dict[str, Any]) -> None:
    job = Job(section, num_batches=2, extra=SGD)
    frozen = STAGES[where]
    results = ranks4.run(train_frozen, job=job, frozen=frozen)
    expected, loss = trained_in_one_process(job, results, frozen)
    for result in results:
        assert_only_the_rest_learned(result, frozen)
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        for name, after in result["after"].items():
            if name != "placeholder":
                torch.testing.assert_close(after, expected[name], rtol=1e-5, atol=1e-6)
    # A head of its own is something to train.
    has_head = {head.stage for head in results[0]["plan"].heads[:-1]}
    whole = {"first": {0}, "middle": {1}, "both": {0, 2}, "last": {3}, "some": set()}[where] - has_head
    assert {result["stage"] for result in results if "placeholder" in result["after"]} == whole


def test_global_is_deepspeed_where_that_can_do_it(ranks4: RankPool) -> None:
    # In DeepSpeed a stage needs something to train, and the first layer an output with a gradient.
    frozen = [0, 4, 8, 9]
    job = Job(None, num_batches=3, dropout=0.2)
    ours = ranks4.run(train_frozen, job=job.but(section=GLOBAL), frozen=frozen)
    theirs = ranks4.run(train_frozen, job=job, frozen=frozen)
    for one, other in zip(ours, theirs, strict=True):
        assert_only_the_rest_learned(one, frozen)
        assert all(torch.equal(p, other["after"][name]) for name, p in one["after"].items())
        assert one["loss"] == other["loss"]


@pytest.mark.parametrize(
    ("section", "num_stages"),
    [(GLOBAL, 4), (INTERLOCK, 4), (FRACTIONAL, 2)],
    ids=["global", "interlock", "replicas"],
)
@pytest.mark.parametrize(
    "extra", [BF16, BF16_ZERO_1, FP32_ZERO_1], ids=["bf16", "bf16, ZeRO 1", "fp32, ZeRO 1"]
)
def test_every_optimizer_can_do_without_parameters(
    ranks4: RankPool, extra: dict[str, Any], section: dict[str, Any], num_stages: int
) -> None:
    job = Job(section, num_stages=num_stages, num_batches=2, extra=extra)  # clips
    frozen = range(3 if num_stages == 4 else 6)
    for result in ranks4.run(train_frozen, job=job, frozen=frozen):
        assert_only_the_rest_learned(result, frozen)
        assert ("placeholder" in result["after"]) == (result["stage"] == 0)
        assert result["loss"] > 0


def resume_frozen(job: Job, frozen: Sequence[int], folder: str) -> tuple[bool, list[float], int]:
    engine = frozen_engine(job, frozen)
    engine.train_batch(iter(micro_batches(job.num_micro_batches)))
    engine.save_checkpoint(folder)
    engine.train_batch(iter(micro_batches(job.num_micro_batches, seed=7)))
    undisturbed = float(engine.drain()), parameters_of(engine)
    engine.destroy()
    engine = frozen_engine(job, frozen)
    engine.load_checkpoint(folder)
    engine.train_batch(iter(micro_batches(job.num_micro_batches, seed=7)))
    resumed = float(engine.drain()), parameters_of(engine)
    steps = engine.global_steps
    engine.destroy()
    same = all(torch.equal(p, resumed[1][name]) for name, p in undisturbed[1].items())
    return same, [undisturbed[0], resumed[0]], steps


@pytest.mark.parametrize("extra", [{}, BF16, BF16_ZERO_1], ids=["fp32", "bf16", "bf16, ZeRO 1"])
def test_a_frozen_stage_can_be_saved_and_loaded(
    ranks4: RankPool, extra: dict[str, Any], tmp_path: Any
) -> None:
    job = Job(INTERLOCK, num_batches=1, extra=extra)
    for same, losses, steps in ranks4.run(
        resume_frozen, job=job, frozen=STAGES["first"], folder=str(tmp_path)
    ):
        assert same
        assert losses[0] == losses[1]
        assert steps == 2


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16, ZeRO 1"])
def test_frozen_tied_weights_need_no_all_reduce(ranks4: RankPool, extra: dict[str, Any]) -> None:
    job = Job(GLOBAL, num_batches=2, tied=True, extra=extra)
    results = ranks4.run(train_frozen, job=job, frozen=[])
    tied = [r["after"]["tied_modules.embedding.weight"] for r in results if r["stage"] in (0, 3)]
    assert torch.equal(*tied)
    for result in results:
        changed = {n for n, p in result["after"].items() if not torch.equal(p, result["before"][n])}
        assert changed == {n for n in result["after"] if not n.startswith("tied_modules.")}
