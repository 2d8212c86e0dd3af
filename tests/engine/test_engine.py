"""The engine on real processes: evaluation, draining, and who waits for whom."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16_ZERO_1,
    VOCABULARY,
    WIDTH,
    Job,
    data_for,
    layers,
    loss_fn,
    make_engine,
    micro_batches,
    outcomes,
    parameters_of,
)
from ranks import RankPool, caught
from torch import Tensor, nn

from ds_interlock import ConfigError, GradientFlowPlan, InProcessPipeline, InterlockConfig, PeerError
from ds_interlock.heads.factory import head_factory
from ds_interlock.schedule.lower import RECEIVE_AHEAD
from ds_interlock.schedule.simulate import SEND_AHEAD

INTERLOCK = {"mode": "interlock", "window": 2, "head": {"type": "norm_linear", "blocks": 1, "weight": 0.7}}
FRACTIONAL = {**INTERLOCK, "window": 1.4}
LOCAL = {"mode": "local"}
GLOBAL = {"mode": "global"}


# Evaluation.


def train_evaluate_train(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    training, replica = data_for(engine, job), engine.grid.get_data_parallel_rank()
    engine.train_batch(training)
    data = micro_batches(3, replica=replica, seed=9, length=7)
    loss, logits, head_losses = engine.eval_batch(
        iter(data), num_micro_batches=3, return_logits=True, return_head_losses=True
    )
    again = engine.eval_batch(iter(data), num_micro_batches=3)
    outputs = engine.eval_batch(iter(data), num_micro_batches=3, compute_loss=False)
    parameters = parameters_of(engine)
    engine.train_batch(training)
    engine.drain()
    result = {
        "loss": (loss.dtype, loss.shape, float(loss)),
        "again": float(again),
        "logits": logits,
        "head_losses": head_losses,
        "outputs": outputs,
        "parameters": parameters,
        "plan": engine.plan,
        "after": parameters_of(engine),
    }
    engine.destroy()
    return result


def evaluate_in_one_process(
    job: Job, results: list[dict[str, Any]], replica: int
) -> tuple[dict[str, float], Tensor]:
    """The same evaluation by hand: losses by name, logits of the last micro-batch."""
    specs, plan = layers(job.dropout), results[0]["plan"]
    config = InterlockConfig.from_deepspeed(job.config())
    head = None if plan.is_end_to_end else head_factory(config.head, specs)
    net = InProcessPipeline([spec.build() for spec in specs], loss_fn, plan, head)
    net.load_state_dict({name: p for result in results for name, p in result["parameters"].items()})
    batch = micro_batches(3, replica=replica, seed=9, length=7)
    losses = net.evaluate(batch)
    hidden = batch[-1][0]
    for layer in net.layers_in_order:
        hidden = layer(hidden)
    names = [f"loss_after_layer_{head.after_layer}" for head in plan.heads[:-1]] + ["final_loss"]
    return {name: float(losses[loss]) for loss, name in enumerate(names)}, hidden.detach()


@pytest.mark.parametrize(
    ("section", "num_stages", "names"),
    [
        (GLOBAL, 4, ["final_loss"]),
        (LOCAL, 4, ["loss_after_layer_3", "loss_after_layer_6", "loss_after_layer_9", "final_loss"]),
        (INTERLOCK, 4, ["loss_after_layer_6", "loss_after_layer_9", "final_loss"]),
        (FRACTIONAL, 4, ["loss_after_layer_4", "loss_after_layer_7", "loss_after_layer_10", "final_loss"]),
        ({**LOCAL, "head": {"token_fraction": 0.5}}, 2, ["loss_after_layer_6", "final_loss"]),
    ],
    ids=["global", "local", "interlock", "fractional", "replicas"],
)
def test_evaluation(ranks4: RankPool, section, num_stages, names):
    job = Job(section, num_stages=num_stages, num_micro_batches=2, num_batches=2, dropout=0.5)
    results = ranks4.run(train_evaluate_train, job=job)
    num_replicas = 4 // num_stages
    expected = [
        evaluate_in_one_process(job, results[replica::num_replicas], replica)
        for replica in range(num_replicas)
    ]
    mean = {name: sum(losses[name] for losses, _ in expected) / num_replicas for name in expected[0][0]}
    assert list(mean) == names
    for rank, result in enumerate(results):
        dtype, shape, loss = result["loss"]
        assert dtype == torch.float32
        assert shape == ()
        assert loss == result["again"] == result["head_losses"]["final_loss"] == results[0]["again"]
        assert result["head_losses"] == pytest.approx(mean, rel=1e-6)
        assert list(result["head_losses"]) == names
        if rank < 4 - num_replicas:
            assert result["logits"] is result["outputs"] is None
        else:
            assert len(result["outputs"]) == 3
            assert torch.equal(result["logits"], result["outputs"][-1])
            torch.testing.assert_close(result["logits"], expected[rank % num_replicas][1])
    # Evaluation leaves no trace in the training.
    (undisturbed,) = outcomes(ranks4, job)
    for outcome, result in zip(undisturbed, results, strict=True):
        assert all(torch.equal(p, result["after"][name]) for name, p in outcome.parameters.items())


# Draining.


def drain_often(job: Job) -> list[float]:
    engine = make_engine(job)
    data = data_for(engine, job)
    losses = [float(engine.drain())]
    for _ in range(job.num_batches):
        engine.train_batch(data)
        losses += [float(engine.drain()), float(engine.drain())]
    engine.destroy()
    return losses


@pytest.mark.parametrize("num_stages", [4, 2])
def test_drain_gives_the_exact_loss_of_the_last_batch(ranks4: RankPool, num_stages):
    job = Job(LOCAL, num_stages=num_stages, num_batches=3, dropout=0.2)
    (exact,) = outcomes(ranks4, job.but(section={**LOCAL, "streaming": False}))
    for losses in ranks4.run(drain_often, job=job):
        assert losses[0] != losses[0], "nan before the first batch"
        assert losses[1::2] == losses[2::2] == exact[0].returned


# Streaming: no collective over the pipe, and stages run ahead.

COLLECTIVES = [
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_reduce_coalesced",
    "all_to_all", "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather",
    "gather_object", "monitored_barrier", "new_group", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "scatter_object_list",
]  # fmt: skip


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, list[int]]]]:
    """Every collective called in its body, and the ranks that take part."""
    calls: list[tuple[str, list[int]]] = []
    genuine = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def record(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            groups = [kwargs.get("group"), *args]
            group = next((g for g in groups if isinstance(g, torch.distributed.ProcessGroup)), None)
            calls.append((name, sorted(torch.distributed.get_process_group_ranks(group))))
            return genuine[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(torch.distributed, name, record(name))
    try:
        yield calls
    finally:
        for name, function in genuine.items():
            setattr(torch.distributed, name, function)


def collectives_of_training(job: Job) -> tuple[list[int], list[tuple[str, list[int]]]]:
    engine = make_engine(job)
    data = data_for(engine, job)
    with recorded_collectives() as calls:
        for _ in range(job.num_batches):
            engine.train_batch(data)
    engine.drain()
    replicas = [rank for rank in range(4) if rank // engine.dp_world_size == engine.stage_id]
    engine.destroy()
    return replicas, calls


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16, ZeRO 1"])
@pytest.mark.parametrize("section", [LOCAL, INTERLOCK], ids=["local", "interlock"])
@pytest.mark.parametrize("num_stages", [4, 2])
def test_a_streaming_batch_has_no_collective_over_the_pipe(ranks4: RankPool, num_stages, section, extra):
    if num_stages == 2 and section is INTERLOCK:
        section = {**INTERLOCK, "window": 1.5}
    job = Job(section, num_stages=num_stages, num_batches=2, extra=extra | {"steps_per_print": 1})
    for replicas, calls in ranks4.run(collectives_of_training, job=job):
        assert all(set(ranks) <= set(replicas) for _, ranks in calls), calls
        if num_stages == 2:
            assert any(ranks == replicas for _, ranks in calls), "replicas must average their gradients"


def test_the_recording_sees_the_collective_that_a_batch_without_streaming_ends_with(ranks4: RankPool):
    job = Job({**LOCAL, "streaming": False}, num_batches=2)
    for _, calls in ranks4.run(collectives_of_training, job=job):
        assert ("broadcast", [0, 1, 2, 3]) in calls


class Held(nn.Linear):
    """The last layer. It waits for the first stage to be two batches further, and a little longer."""

    def __init__(self, folder: Path, num_batches: int) -> None:
        super().__init__(WIDTH, VOCABULARY)
        self.folder, self.num_batches = folder, num_batches
        self.ahead: list[int] = []

    def forward(self, hidden_btd: Tensor) -> Tensor:
        if hidden_btd.is_meta:  # heads look at what it returns
            return super().forward(hidden_btd)
        batch = len(self.ahead)
        last = min(batch + 2, self.num_batches - 1)
        while not (self.folder / str(last)).exists():
            time.sleep(0.01)
        time.sleep(0.05)  # to run away in
        self.ahead.append(len(list(self.folder.iterdir())) - batch)
        return super().forward(hidden_btd)


def train_with_a_held_last_stage(job: Job, folder: Path) -> list[int]:
    """By how many batches the first stage was further than the last one, at the start of each of its own."""
    from deepspeed.pipe import LayerSpec

    specs = [*layers()[:-1], LayerSpec(Held, folder, job.num_batches)]
    engine = make_engine(job, layers=specs)
    data = data_for(engine, job)
    for batch in range(job.num_batches):
        engine.train_batch(data)
        if engine.is_first_stage():
            (folder / str(batch)).touch()
    engine.drain()
    ahead = [
        number for module in engine.module.modules() if isinstance(module, Held) for number in module.ahead
    ]
    engine.destroy()
    return ahead


def test_the_first_stage_runs_ahead_of_a_slow_last_one_but_not_away(ranks4: RankPool, tmp_path: Path):
    job = Job({**LOCAL, "head": {"type": "linear"}}, num_micro_batches=1, num_batches=30)
    *_, ahead = ranks4.run(train_with_a_held_last_stage, job=job, folder=tmp_path)
    assert len(ahead) == job.num_batches
    # A link holds what was sent but not received, and what was received but not taken; a stage holds one.
    assert max(ahead) <= 3 * (SEND_AHEAD + RECEIVE_AHEAD + 1)


# The end of a script.


def exit_after(job: Job, *, fails: bool) -> tuple[str | None, list[str]]:
    """What a rank raises in the second batch, and the collectives that its exit handler calls then."""
    engine = make_engine(job)
    engine.train_batch(iter(micro_batches(job.num_micro_batches)))
    data = iter(micro_batches(1 if fails else job.num_micro_batches))
    error = caught(engine.train_batch, data)
    torch.distributed.barrier()
    with recorded_collectives() as calls:
        engine._at_exit()
    torch.distributed.barrier()
    engine.destroy()
    return error and type(error).__name__, [name for name, _ in calls]


@pytest.mark.parametrize("section", [GLOBAL, LOCAL, INTERLOCK], ids=["global", "local", "interlock"])
def test_no_collective_in_the_exit_handler_after_an_error(ranks4: RankPool, section):
    job = Job({**section, "timeout_seconds": 2.0}, num_micro_batches=2, extra={"steps_per_print": 1})
    results = ranks4.run(exit_after, job=job, fails=True)
    assert [error for error, _ in results] == ["DataError", "PeerError", "PeerError", "PeerError"]
    assert all(calls == [] for _, calls in results), "a script that goes on after an error, as by sys.exit"
    for error, calls in ranks4.run(exit_after, job=job, fails=False):
        assert error is None
        assert "barrier" in calls, "otherwise it drains, for the stages that still need what it has sent"


def exit_with_an_error_in_the_script(job: Job) -> Exception | None:
    """Rank 1 ends, as Python ends where an exception is not caught, while the others go on."""
    engine = make_engine(job)
    engine.train_batch(iter(micro_batches(1)))
    error = None
    if engine.global_rank == 1:
        sys.last_value = KeyError("in the script")
        engine._at_exit()
        del sys.last_value
    else:
        error = caught(engine.drain)
    torch.distributed.barrier()
    engine.destroy()
    return error


def test_the_others_are_told_of_an_error_in_the_script(ranks2: RankPool):
    job = Job({**LOCAL, "timeout_seconds": 1.0}, num_stages=2, num_micro_batches=1)
    error, _ = ranks2.run(exit_with_an_error_in_the_script, job=job)
    assert isinstance(error, PeerError)
    assert "stage 1 (rank 1) failed in batch 2: KeyError: 'in the script'" in str(error)


# Plans of one's own, and shapes that change.


def train_own_plan() -> tuple[tuple[int, ...], Exception | None]:
    job = Job(INTERLOCK, num_batches=1)

    def keeps(bounds: list[int]) -> GradientFlowPlan:
        return GradientFlowPlan.deep_supervision(stage_bounds=bounds, head_weight=0.2)

    def moves(bounds: list[int]) -> GradientFlowPlan:
        return GradientFlowPlan.local(stage_bounds=[0, 2, 4, 6, 11])

    engine = make_engine(job, plan=keeps)
    engine.train_batch(data_for(engine, job))
    engine.drain()
    return engine.plan.stage_bounds, caught(make_engine, job, plan=moves)


def test_a_plan_of_ones_own(ranks4: RankPool):
    results = ranks4.run(train_own_plan)
    for bounds, error in results:
        assert bounds == (0, 3, 6, 9, 11)
        assert isinstance(error, ConfigError)
        assert "must keep the bounds it is given" in str(error)


def train_on_lengths(lengths: list[int]) -> list[float]:
    engine = make_engine(Job({**INTERLOCK, "streaming": False}))
    losses = [float(engine.train_batch(iter(micro_batches(4, length=length)))) for length in lengths]
    engine.drain()
    engine.destroy()
    return losses


def test_batches_of_different_lengths(ranks4: RankPool):
    by_length = ranks4.run(train_on_lengths, lengths=[5, 9, 2, 9])
    assert all(losses == by_length[0] for losses in by_length)
    assert len(set(by_length[0])) == 4
