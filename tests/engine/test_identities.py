"""What must come out the same whichever way it is computed, on real processes."""

import logging
from collections.abc import Callable

import pytest
import torch
from engine_jobs import (
    BF16_ZERO_1,
    FP32_ZERO_1,
    Job,
    Outcome,
    assert_same,
    is_same,
    layers,
    loss_fn,
    make_engine,
    micro_batches,
    outcomes,
    parameters_of,
    train_all,
)
from ranks import RankPool
from torch import Tensor

from ds_interlock import GradientFlowPlan, InProcessPipeline, InterlockConfig
from ds_interlock.heads.factory import head_factory

BLOCK_HEAD = {"type": "norm_linear", "blocks": 1, "token_fraction": 0.4, "weight": 0.7}
NORM_HEAD = {"type": "norm_linear", "token_fraction": 0.6, "weight": 1.5}


def interlock(window: float, **section: object) -> dict[str, object]:
    return {"mode": "interlock", "window": window, **section}


# The ends of the scale.


@pytest.mark.parametrize(
    "extra", [{}, FP32_ZERO_1, BF16_ZERO_1], ids=["fp32", "fp32, ZeRO 1", "bf16, ZeRO 1"]
)
def test_the_widest_window_is_global(ranks4: RankPool, extra):
    job = Job(None, extra=extra, dropout=0.2, num_batches=3)
    widest, end_to_end = outcomes(ranks4, job.but(section=interlock(4)), job.but(section={"mode": "global"}))
    assert_same(widest, end_to_end)
    assert [o.returned for o in widest] == [o.returned for o in end_to_end]


def test_the_narrowest_window_is_local(ranks4: RankPool):
    job = Job(None, dropout=0.2, num_batches=3)
    narrowest, local, wider = outcomes(
        ranks4,
        job.but(section=interlock(1, head=NORM_HEAD)),
        job.but(section={"mode": "local", "head": NORM_HEAD}),
        job.but(section=interlock(2, head=NORM_HEAD)),
    )
    assert_same(narrowest, local)
    assert not is_same(local, wider)


def train_with_log(jobs: list[Job]) -> tuple[list[Outcome], list[str]]:
    """What the jobs come to, and what DeepSpeed's logger says of interlocking on the way."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("DeepSpeed").addHandler(handler)
    try:
        return train_all(jobs), [line for line in lines if line.startswith("interlock")]
    finally:
        logging.getLogger("DeepSpeed").removeHandler(handler)


def test_one_stage_is_global_in_every_mode(ranks2: RankPool):
    phases = [{"from_step": 0, "window": 1.5}, {"from_step": 1, "window": 3}]
    sections: list[dict[str, object] | None] = [
        None,
        {"mode": "global"},
        {"mode": "local"},
        interlock(1.25),
        interlock(2),
        interlock(5, head_stride=2, combine="farthest"),
        {"schedule": phases},
    ]
    jobs = [Job(section, num_stages=1, num_batches=2, extra=BF16_ZERO_1) for section in sections]
    by_rank = ranks2.run(train_with_log, jobs=jobs)
    deepspeed, *ours = zip(*(outcomes_of_rank for outcomes_of_rank, _ in by_rank), strict=True)
    for each in ours:
        assert_same(each, deepspeed)
        assert [o.returned for o in each] == [o.returned for o in deepspeed]
    (first, *others), nothing = (lines for _, lines in by_rank)
    assert first == 'interlock: one stage has no border: mode "local" is ordinary backpropagation here'
    assert len(others) == 4
    assert nothing == []


# Streaming changes when things happen, not what.


def with_and_without_streaming(pool: RankPool, section: dict[str, object], job: Job) -> None:
    streaming, waiting = outcomes(
        pool, job.but(section=section), job.but(section={**section, "streaming": False})
    )
    assert_same(streaming, waiting)
    exact = waiting[0].returned
    assert len(set(exact)) == job.num_batches
    for outcome in waiting:
        assert outcome.returned == exact
        assert outcome.final == exact[-1]
    for outcome in streaming:
        assert_from_earlier_batches(outcome.returned, exact)


def assert_from_earlier_batches(returned: list[float], exact: list[float]) -> None:
    """``returned[t]`` was the loss of some batch up to t, never older than the one before; nan at first."""
    newest = -1
    for batch, value in enumerate(returned):
        if value != value:
            assert newest == -1, "nan after a loss had arrived"
            continue
        assert value in exact[: batch + 1]
        assert exact.index(value) >= newest
        newest = exact.index(value)


@pytest.mark.parametrize(
    ("window", "head"),
    [(1, BLOCK_HEAD), (1.5, BLOCK_HEAD), (1.5, NORM_HEAD), (2, NORM_HEAD), (3, BLOCK_HEAD)],
)
def test_streaming(ranks4: RankPool, window, head):
    with_and_without_streaming(ranks4, interlock(window, head=head), Job(None, dropout=0.3))


@pytest.mark.parametrize("num_micro_batches", [1, 6])
def test_streaming_with_fewer_and_more_micro_batches_than_stages(ranks4: RankPool, num_micro_batches):
    job = Job(None, num_micro_batches=num_micro_batches, dropout=0.1, num_batches=4)
    with_and_without_streaming(ranks4, interlock(2, combine="farthest"), job)


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16, ZeRO 1"])
def test_streaming_with_replicas(ranks4: RankPool, extra):
    job = Job(None, num_stages=2, num_micro_batches=3, dropout=0.1, extra=extra)
    with_and_without_streaming(ranks4, interlock(1, head=NORM_HEAD), job)


def test_streaming_with_uneven_stages(ranks5: RankPool):
    # DeepSpeed cannot seed layers one by one with this partition.
    uneven = {"partition_method": "parameters", "seed_layers": False}
    job = Job(None, num_stages=5, dropout=0.3, module=uneven)
    with_and_without_streaming(ranks5, interlock(2, extra_in_flight=1, head=BLOCK_HEAD), job)


def test_streaming_with_layers_seeded_one_by_one(ranks4: RankPool):
    job = Job(None, dropout=0.3, num_batches=3, module={"seed_layers": True})
    with_and_without_streaming(ranks4, interlock(2.5), job)


# Many processes against one.


MakePlan = Callable[[list[int]], GradientFlowPlan]


def sgd_step(job: Job, plan: MakePlan | None = None) -> dict[str, object]:
    """One step of plain SGD with learning rate 1: what is left of a parameter shows its gradient."""
    engine = make_engine(job, plan=plan)
    before = parameters_of(engine)
    engine.train_batch(iter(micro_batches(job.num_micro_batches)))
    loss = float(engine.drain())
    return {"before": before, "after": parameters_of(engine), "loss": loss, "plan": engine.plan}


def sgd_step_in_process(
    job: Job, plan: GradientFlowPlan, before: dict[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    specs = layers()
    config = InterlockConfig.from_deepspeed(job.config())
    net = InProcessPipeline([spec.build() for spec in specs], loss_fn, plan, head_factory(config.head, specs))
    assert {name for name, _ in net.named_parameters()} == before.keys()
    net.load_state_dict(before)
    losses = net.accumulate_gradients(micro_batches(job.num_micro_batches))
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    return dict(net.named_parameters()), float(losses[plan.final])


def compare_with_one_process(pool: RankPool, job: Job, plan: MakePlan | None = None) -> None:
    job = job.but(extra={"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "gradient_clipping": 0.0})
    on_ranks = pool.run(sgd_step, job=job, plan=plan)
    before = {name: value for result in on_ranks for name, value in result["before"].items()}
    expected, loss = sgd_step_in_process(job, on_ranks[0]["plan"], before)
    for result in on_ranks:
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        for name, after in result["after"].items():
            torch.testing.assert_close(
                after, expected[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert not torch.equal(after, before[name]), f"{name} has no gradient"


@pytest.mark.parametrize(
    "section",
    [
        interlock(1.5, head={"type": "linear"}),
        interlock(2, head={"weight": 0.7}),
        interlock(3, combine="farthest"),
        interlock(2, head_stride=2, head={"type": "low_rank", "rank": 3}),
    ],
    ids=["1.5", "2", "3, farthest", "2, stride 2"],
)
def test_four_processes_against_one(ranks4: RankPool, section):
    compare_with_one_process(ranks4, Job(section))


@pytest.mark.parametrize("section", [interlock(1.5), interlock(3, head={"weight": 0.7})], ids=["1.5", "3"])
def test_five_processes_against_one(ranks5: RankPool, section):
    compare_with_one_process(ranks5, Job(section, num_stages=5, num_micro_batches=3))


def deep_supervision(bounds: list[int]) -> GradientFlowPlan:
    return GradientFlowPlan.deep_supervision(stage_bounds=bounds, head_weight=0.3)


def test_deep_supervision_against_one_process(ranks4: RankPool):
    compare_with_one_process(ranks4, Job(interlock(2)), deep_supervision)
