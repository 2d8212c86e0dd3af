"""DeepSpeed's options that a stage's own work must heed: autocast, compiled layers, the wall clock."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16_ZERO_1,
    FP32_ZERO_1,
    WARMUP,
    Block,
    Job,
    Outcome,
    assert_same,
    data_for,
    is_same,
    layers,
    loss_fn,
    make_engine,
    micro_batches,
    outcomes,
    parameters_of,
    train,
)
from ranks import RankPool, caught
from torch import Tensor

from ds_interlock import ConfigError, GradientFlowPlan, InProcessPipeline, InterlockConfig
from ds_interlock.config import check_deepspeed
from ds_interlock.heads.factory import head_factory

GLOBAL: dict[str, Any] = {"mode": "global"}
TRUNCATED: list[dict[str, Any]] = [
    {"mode": "local"},
    {"mode": "interlock", "window": 1.5},
    {"mode": "interlock", "window": 2},
]
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "gradient_clipping": 0.0}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def train_in_one_process(
    job: Job, plan: GradientFlowPlan, before: dict[str, Tensor], *, autocast: bool
) -> dict[str, Tensor]:
    specs = layers()
    head = head_factory(InterlockConfig.from_deepspeed(job.config()).head, specs)
    net = InProcessPipeline([spec.build() for spec in specs], loss_fn, plan, head)
    net.load_state_dict(before)
    for module in [*net.layers_in_order, *net.heads.values()] if autocast else []:
        for name in {"forward", "loss"} & set(dir(module)):
            setattr(module, name, torch.autocast("cpu", torch.bfloat16)(getattr(module, name)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    data = micro_batches(job.num_batches * job.num_micro_batches)
    for batch in range(job.num_batches):
        optimizer.zero_grad()
        net.accumulate_gradients(data[batch * job.num_micro_batches :][: job.num_micro_batches])
        optimizer.step()
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def train_and_remember(jobs: Sequence[Job], *, compiled: bool = False) -> list[dict[str, Any]]:
    return [_train_and_remember(job, compiled=compiled) for job in jobs]


def _train_and_remember(job: Job, *, compiled: bool) -> dict[str, Any]:
    engine = make_engine(job)
    if compiled:
        engine.compile(backend="aot_eager")
    before, data = parameters_of(engine), data_for(engine, job)
    for _ in range(job.num_batches):
        engine.train_batch(data)
    if job.section is None:
        return {"after": parameters_of(engine)}
    engine.drain()
    return {"before": before, "after": parameters_of(engine), "plan": engine.plan}


def differences(results: Sequence[dict[str, Any]], expected: dict[str, Tensor]) -> float:
    """The largest difference of a parameter's movement."""
    return max(
        float((after - expected[name]).abs().max())
        for result in results
        for name, after in result["after"].items()
    )


# torch_autocast.


def test_autocast_in_global_is_deepspeeds(ranks4: RankPool):
    autocast = Job(None, num_micro_batches=2, num_batches=2, extra=AUTOCAST)
    zero = autocast.but(extra=AUTOCAST | FP32_ZERO_1, num_stages=2)
    jobs = [each.but(section=section) for each in (autocast, zero) for section in (None, GLOBAL)]
    deepspeed, ours, deepspeed_zero, ours_zero, without = outcomes(
        ranks4, *jobs, autocast.but(section=GLOBAL, extra={})
    )
    assert_same(deepspeed, ours)
    assert_same(deepspeed_zero, ours_zero)
    assert [o.returned for o in deepspeed] == [o.returned for o in ours]
    assert not is_same(ours, without)


def test_autocast_elsewhere_is_that_of_one_process(ranks4: RankPool):
    jobs = [Job(section, num_micro_batches=2, num_batches=1, extra=SGD | AUTOCAST) for section in TRUNCATED]
    by_job = zip(*ranks4.run(train_and_remember, jobs=jobs), strict=True)
    for job, results in zip(jobs, by_job, strict=True):
        before = {name: value for result in results for name, value in result["before"].items()}
        plan = results[0]["plan"]
        like = train_in_one_process(job, plan, before, autocast=True)
        unlike = train_in_one_process(job, plan, before, autocast=False)
        assert differences(results, like) < 1e-6 < 1e-5 < differences(results, unlike), job.section


# Compiled layers.


def test_compiled_layers(ranks4: RankPool):
    jobs = [Job(section, num_batches=1, extra=SGD) for section in [None, GLOBAL, *TRUNCATED]]
    by_rank = ranks4.run(train_and_remember, jobs=jobs, compiled=True)
    deepspeed, *by_job = zip(*by_rank, strict=True)
    for job, results in zip(jobs[1:], by_job, strict=True):
        before = {name: value for result in results for name, value in result["before"].items()}
        expected = train_in_one_process(job, results[0]["plan"], before, autocast=False)
        assert differences(results, expected) < 1e-6, job.section
        assert differences(results, before) > 1e-3, job.section
    expected = {name: value for result in deepspeed for name, value in result["after"].items()}
    assert differences(by_job[0], expected) == 0


def compiled_by_the_script() -> Exception | None:
    """Layers that a script has compiled itself, in one process."""
    blocks = [torch.compile(Block(), backend="aot_eager") for _ in range(4)]
    plan = GradientFlowPlan.n_wise(4, 3)
    net = InProcessPipeline(
        blocks, lambda outputs, labels: outputs.square().mean(), plan, lambda head: Block()
    )
    return caught(net.accumulate_gradients, [(torch.randn(2, 3, 8), torch.zeros(2))])


def test_layers_that_a_script_has_compiled(ranks2: RankPool):
    assert ranks2.run(compiled_by_the_script) == [None, None]


# wall_clock_breakdown.


def printed(jobs: Sequence[Job]) -> list[str]:
    """What training prints on this rank, job by job."""
    texts = []
    for job in jobs:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            train_and_remember([job])
        texts.append(text.getvalue())
    return texts


def test_wall_clock_breakdown(ranks4: RankPool):
    extra = {"wall_clock_breakdown": True, "steps_per_print": 2}
    jobs = [Job(section, num_batches=4, extra=extra) for section in [GLOBAL, *TRUNCATED]]
    texts, *_ = ranks4.run(printed, jobs=jobs)
    names = [
        "batch_input",
        "fwd_microstep",
        "bwd_microstep",
        "bwd_inner_microstep",
        "bwd_allreduce_microstep",
    ]
    names += ["step_microstep", "fwd", "bwd", "bwd_inner", "bwd_allreduce", "step", "pipe_send_output"]
    for job, text in zip(jobs, texts, strict=True):
        times = re.findall(r"\| (\w+): ([\d.]+)", text)
        relays = job.section not in ({"mode": "local"}, {"mode": "interlock", "window": 1})
        for name in names + ["pipe_recv_grad"] * relays:
            values = [float(value) for timer, value in times if timer == name]
            assert len(values) == 2, (job.section, name)
            assert all(value > 0 for value in values), (job.section, name)


# What is refused.


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype.*loss scaling"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled.*which no pipeline calls"),
        ({"wall_clock_breakdown": True}, "steps_per_print: null.*every steps_per_print batches"),
    ],
)
def test_options_that_cannot_work_are_refused(config, says):
    with pytest.raises(ConfigError, match=says):
        check_deepspeed(config)


def test_options_that_are_off_are_not_refused():
    off = {"torch_autocast": {"enabled": False, "dtype": "fp16"}, "flops_profiler": {"enabled": False}}
    check_deepspeed({**off, "wall_clock_breakdown": False})
    check_deepspeed({"wall_clock_breakdown": True, "steps_per_print": 10})


# Muon, whose groups DeepSpeed makes by flags of parameters.

MUON = {"optimizer": {"type": "Muon", "params": {"lr": 0.01, "torch_adam": True}}}


def train_with_muon(jobs: Sequence[Job]) -> list[Outcome]:
    with torch._dynamo.config.patch(disable=True):  # its kernels are to be compiled when it is imported
        return [train(job) for job in jobs]


def muon_with_scales() -> Exception | None:
    return caught(make_engine, Job({"mode": "local", "head": {"learning_rate_scale": 2.0}}, 2, extra=MUON))


def test_muon(ranks2: RankPool) -> None:
    job = Job(None, 2, num_micro_batches=2, num_batches=2, extra={**MUON, **WARMUP})
    local = job.but(section={"mode": "local"}, extra={**MUON, **WARMUP, **BF16_ZERO_1})
    waiting = local.but(section={"mode": "local", "streaming": False})
    by_rank = ranks2.run(train_with_muon, jobs=[job, job.but(section=GLOBAL), local, waiting])
    theirs, ours, of_local, of_waiting = zip(*by_rank, strict=True)
    assert_same(theirs, ours)
    assert_same(of_local, of_waiting)
    for error in ranks2.run(muon_with_scales):
        assert isinstance(error, ConfigError)
        assert 'optimizer.type "Muon" makes groups of its own' in str(error)
