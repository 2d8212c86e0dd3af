"""Fitting the heads before training: what is learned, by whom, and that nothing else changes."""

from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16,
    BF16_ZERO_1,
    FP32_ZERO_1,
    WARMUP,
    Job,
    data_for,
    layers,
    loss_fn,
    make_engine,
    micro_batches,
    outcomes,
    parameters_of,
)
from ranks import RankPool
from torch import Tensor

from ds_interlock import GradientFlowPlan, InProcessPipeline, InterlockConfig
from ds_interlock.engine.head_warmup import HeadOptimizer, head_program
from ds_interlock.heads.factory import head_factory

RATE = 0.02
HEAD = {"type": "norm_linear", "warmup_learning_rate": RATE, "weight": 0.3}
INTERLOCK = {"mode": "interlock", "window": 2, "head": HEAD}
FRACTIONAL = {**INTERLOCK, "window": 1.4}
LOCAL = {"mode": "local", "head": HEAD}
STILL = {"optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}}}


def fit_and_step(job: Job, num_steps: int) -> dict[str, Any]:
    """Fits heads by hand, then takes one training step, which may have a learning rate of 0."""
    engine = make_engine(job)
    before = parameters_of(engine)
    losses = engine.fit_heads(data_for(engine, job.but(num_batches=num_steps)), num_steps)
    fitted = parameters_of(engine)
    rate, steps, consumed = engine.get_lr(), engine.global_steps, engine.consumed_micro_batches
    has_state = any(engine.optimizer.state.values()) if job.extra == WARMUP else None
    engine.train_batch(iter(micro_batches(job.num_micro_batches)))
    engine.drain()
    result = {
        "losses": losses,
        "before": before,
        "fitted": fitted,
        "stepped": parameters_of(engine),
        "counts": (steps, consumed, rate, has_state),
        "stage": engine.stage_id,
        "plan": engine.plan,
    }
    engine.destroy()
    return result


def fitted_in_one_process(
    job: Job, results: list[dict[str, Any]], num_steps: int
) -> tuple[dict[str, Tensor], list[dict[int, float]]]:
    """The same by hand: heads on the outputs of layers, one AdamW for each, the mean over replicas."""
    specs, plan = layers(), results[0]["plan"]
    head = head_factory(InterlockConfig.from_deepspeed(job.config()).head, specs)
    net = InProcessPipeline([spec.build() for spec in specs], loss_fn, plan, head)
    net.load_state_dict({name: p for result in results for name, p in result["before"].items()})
    num_replicas = 4 // job.num_stages
    data = [
        iter(micro_batches(num_steps * job.num_micro_batches, replica=replica))
        for replica in range(num_replicas)
    ]
    optimizers = [
        torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0) for head in net.heads.values()
    ]
    losses: list[dict[int, float]] = []
    for _ in range(num_steps):
        sums = dict.fromkeys(range(len(plan.heads) - 1), 0.0)
        for some in data:
            for _ in range(job.num_micro_batches):
                hidden, labels = next(some)
                for number, layer in enumerate(net.layers_in_order):
                    for loss, place in enumerate(plan.heads[:-1]):
                        if place.after_layer == number:
                            value = loss_fn(net.heads[str(loss)](hidden), labels)
                            value = value / job.num_micro_batches / num_replicas
                            value.backward()
                            sums[loss] += float(value.detach())
                    hidden = layer(hidden).detach()
        losses.append(sums)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return dict(net.named_parameters()), losses


@pytest.mark.parametrize(
    ("section", "num_stages"),
    [(INTERLOCK, 4), (FRACTIONAL, 4), (LOCAL, 2)],
    ids=["window 2", "window 1.4", "replicas"],
)
def test_heads_are_fitted_and_nothing_else(
    ranks4: RankPool, section: dict[str, Any], num_stages: int
) -> None:
    job = Job(section, num_stages=num_stages, num_micro_batches=3, extra=WARMUP)
    results = ranks4.run(fit_and_step, job=job, num_steps=5)
    expected, losses = fitted_in_one_process(job, results, 5)
    losses_by_name = {}
    for result in results:
        losses_by_name |= result["losses"]
        for name, fitted in result["fitted"].items():
            if name.startswith("heads."):
                torch.testing.assert_close(fitted, expected[name], rtol=1e-5, atol=1e-6)
                assert not torch.equal(fitted, result["before"][name])
            else:
                assert torch.equal(fitted, result["before"][name])
        reads = 15 if result["stage"] == 0 else 0
        assert result["counts"] == (0, reads, [1e-3], False), "steps, data, rate, optimizer state"
    heads = results[0]["plan"].heads[:-1]
    assert losses_by_name.keys() == {f"loss_after_layer_{head.after_layer}" for head in heads}
    for loss, head in enumerate(heads):
        values = losses_by_name[f"loss_after_layer_{head.after_layer}"]
        assert values == pytest.approx([of_batch[loss] for of_batch in losses], rel=1e-5)


def test_losses_fall(ranks4: RankPool) -> None:
    results = ranks4.run(fit_and_step_on_one_batch, job=Job(LOCAL))
    for losses in (values for result in results for values in result.values()):
        assert len(losses) == 12
        assert losses[-1] < losses[0] - 0.3


def fit_and_step_on_one_batch(job: Job) -> dict[str, list[float]]:
    engine = make_engine(job)
    losses = engine.fit_heads(iter(12 * micro_batches(job.num_micro_batches)), 12)
    engine.drain()
    engine.destroy()
    return losses


@pytest.mark.parametrize("num_stages", [4, 2])
@pytest.mark.parametrize(
    "extra", [{}, BF16, BF16_ZERO_1, FP32_ZERO_1], ids=["fp32", "bf16", "bf16, ZeRO 1", "fp32, ZeRO 1"]
)
def test_the_first_step_starts_from_the_fitted_heads(
    ranks4: RankPool, extra: dict[str, Any], num_stages: int
) -> None:
    job = Job(LOCAL, num_stages=num_stages, extra=extra | STILL)
    for result in ranks4.run(fit_and_step, job=job, num_steps=3):
        assert all(torch.equal(p, result["stepped"][name]) for name, p in result["fitted"].items())
        changed = {n for n, p in result["fitted"].items() if not torch.equal(p, result["before"][n])}
        assert changed == {name for name in result["fitted"] if name.startswith("heads.")}


def test_in_half_precision_small_steps_add_up(ranks4: RankPool) -> None:
    # At 1e-4 a step of a weight near 1 is lost in bfloat16, and 60 of them are not.
    slow = {**LOCAL, "head": {**HEAD, "warmup_learning_rate": 1e-4}}
    for result in ranks4.run(fit_and_step, job=Job(slow, extra=BF16 | STILL), num_steps=60):
        norms = [n for n in result["fitted"] if n.startswith("heads.") and n.endswith("norm.weight")]
        for name in norms:
            assert not torch.equal(result["fitted"][name], result["before"][name])


# In front of the first batch.


def warm_up_by_itself(job: Job, folder: str) -> dict[str, Any]:
    engine = make_engine(job)
    engine.train_batch(data_for(engine, job))
    engine.drain()
    after_one = parameters_of(engine)
    consumed = [engine.consumed_micro_batches]
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = make_engine(job)
    engine.load_checkpoint(folder)
    engine.train_batch(iter(micro_batches(job.num_micro_batches)))
    engine.drain()
    consumed.append(engine.consumed_micro_batches)
    engine.destroy()
    return {"after_one": after_one, "consumed": consumed}


def fit_by_hand_then_train(job: Job, num_steps: int) -> dict[str, Tensor]:
    engine = make_engine(job)
    data = data_for(engine, job)
    engine.fit_heads(data, num_steps)
    engine.train_batch(data)
    engine.drain()
    parameters = parameters_of(engine)
    engine.destroy()
    return parameters


def test_the_first_batch_of_a_run_is_preceded_by_the_warm_up(ranks4: RankPool, tmp_path: Any) -> None:
    warm = {**INTERLOCK, "head": {**HEAD, "warmup_steps": 2}}
    job = Job(warm, num_batches=4, dropout=0.2)
    results = ranks4.run(warm_up_by_itself, job=job, folder=str(tmp_path))
    by_hand = ranks4.run(fit_by_hand_then_train, job=job.but(section=INTERLOCK), num_steps=2)
    by_hand_too = ranks4.run(fit_by_hand_then_train, job=job, num_steps=2)
    for stage, (result, *others) in enumerate(zip(results, by_hand, by_hand_too, strict=True)):
        for other in others:
            assert all(torch.equal(p, other[name]) for name, p in result["after_one"].items())
        # Three batches, then a resumed run starts training at once.
        assert result["consumed"] == ([12, 16] if stage == 0 else [0, 0])


def test_it_makes_a_difference_to_training(ranks4: RankPool) -> None:
    cold = Job(INTERLOCK, num_batches=1)
    warm = cold.but(section={**INTERLOCK, "head": {**HEAD, "warmup_steps": 1}}, num_batches=2)
    (cold_outcomes,) = outcomes(ranks4, cold)
    for one, other in zip(cold_outcomes, ranks4.run(train_one_batch, job=warm), strict=True):
        assert not all(torch.equal(p, other[name]) for name, p in one.parameters.items())


def train_one_batch(job: Job) -> dict[str, Tensor]:
    engine = make_engine(job)
    engine.train_batch(data_for(engine, job))
    engine.drain()
    return parameters_of(engine)


def fit_without_heads() -> tuple[dict[str, Any], int]:
    engine = make_engine(Job({"mode": "global", "head": {"warmup_steps": 5}}))
    losses = engine.fit_heads(iter(()), 3)
    engine.train_batch(iter(micro_batches(4)))
    engine.drain()
    return losses, engine.consumed_micro_batches


def test_without_auxiliary_heads_nothing_happens(ranks4: RankPool) -> None:
    assert ranks4.run(fit_without_heads) == [({}, 4), ({}, 0), ({}, 0), ({}, 0)]


# Its parts.


def test_the_program_has_neither_backward_pass_nor_final_loss() -> None:
    plan = GradientFlowPlan.n_wise(None, 1.5, stage_bounds=[0, 3, 6, 9])
    text = [[str(action) for action in stage] for stage in head_program(plan, 2).stages]
    assert text == [
        ["0LOAD0", "0F0", "0SEND_F0", "0LOAD1", "0F1", "0SEND_F1"],
        ["1RECV_F0", "1RECV_F1", "1F0@0", "1F0", "1SEND_F0", "1H0@0", "1F1@0", "1F1", "1SEND_F1", "1H1@0"],
        ["2RECV_F0", "2RECV_F1", "2F0@1", "2F0", "2H0@1", "2F1@1", "2F1", "2H1@1"],
    ]


def test_heads_without_trainable_parameters_need_no_optimizer() -> None:
    optimizer = HeadOptimizer({}, RATE)
    optimizer.step()
    optimizer.update_masters_of_deepspeed()
