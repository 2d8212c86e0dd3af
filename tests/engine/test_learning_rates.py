"""Learning-rate groups: parameters say what their rate is multiplied with, stages may differ in that."""

from functools import partial
from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16,
    BF16_ZERO_1,
    FP32_ZERO_1,
    WARMUP,
    Job,
    make_engine,
    make_module,
    micro_batches,
    parameters_of,
)
from ranks import RankPool, caught
from torch import Tensor, nn

from ds_interlock import ConfigError
from ds_interlock.engine.parameter_groups import with_groups_of_heads

HEAD = {"type": "norm_linear", "learning_rate_scale": 3.0}
INTERLOCK = {"mode": "interlock", "window": 2, "head": HEAD}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "gradient_clipping": 0.0}
# Of 11 layers in 4 stages: 0-2, 3-5, 6-8, 9-10. Stages 1 and 2 have heads.
SCALES = {"1": 0.5, "2": 0.5, "6": 2.0, "7": 2.0, "8": 2.0, "9": 0.25, "heads": 0.5}
RATES = [[1.0, 0.5], [1.0, 1.5], [1.5, 2.0], [1.0, 0.25]]
RATES_WITH_BLOCKS = [[1.0, 0.5], [1.0, 0.5, 1.5], [0.5, 1.5, 2.0], [1.0, 0.25]]


def scaled_engine(job: Job, **initialize: Any) -> Any:
    """The engine of ``job``, with ``SCALES`` on the parameters of its layers."""
    import ds_interlock

    net = make_module(job)
    for name, parameter in net.named_parameters():
        scale = SCALES.get(name.split(".")[0])
        if scale is not None:
            parameter.learning_rate_scale = scale
    engine, *_ = ds_interlock.initialize(model=net, config=job.config(), **initialize)
    torch.manual_seed(900 + engine.global_rank)
    return engine


def scale_of(name: str) -> float:
    is_readout = name.startswith("heads.") and ".blocks." not in name  # blocks learn as layers do
    return SCALES.get(name.split(".")[0], 1.0) * (3.0 if is_readout else 1.0)


def take_a_step(job: Job, scaled: bool) -> tuple[dict[str, Tensor], list[float]]:
    engine = scaled_engine(job) if scaled else make_engine(job)
    before = parameters_of(engine)
    engine.train_batch(iter(micro_batches(job.num_micro_batches)))
    engine.drain()
    steps = {name: after - before[name] for name, after in parameters_of(engine).items()}
    rates = engine.get_lr()
    engine.destroy()
    return steps, rates


def test_a_step_is_as_long_as_its_rate(ranks4: RankPool) -> None:
    head = {**HEAD, "blocks": 1}
    job = Job({**INTERLOCK, "head": head}, num_batches=1, extra=SGD)
    plain = job.but(section={**INTERLOCK, "head": {**head, "learning_rate_scale": 1.0}})
    results = zip(
        ranks4.run(take_a_step, job=job, scaled=True),
        ranks4.run(take_a_step, job=plain, scaled=False),
        RATES_WITH_BLOCKS,
        strict=True,
    )
    for (steps, rates), (plain_steps, _), expected in results:
        assert rates == pytest.approx([0.5 * scale for scale in expected])
        for name, step in steps.items():
            torch.testing.assert_close(step, scale_of(name) * plain_steps[name], rtol=1e-4, atol=1e-6)


def rates_in_time(job: Job) -> list[list[float]]:
    engine = scaled_engine(job)
    rates = []
    for _ in range(4):
        engine.train_batch(iter(micro_batches(job.num_micro_batches)))
        rates.append(engine.get_lr())
    engine.drain()
    engine.destroy()
    return rates


def test_schedules_keep_the_ratios(ranks4: RankPool) -> None:
    by_stage = ranks4.run(rates_in_time, job=Job(INTERLOCK, extra=WARMUP))
    base = [rates[0] for rates in by_stage[0]]
    assert base[0] < base[-1] <= 3e-2
    for rates, scales in zip(by_stage, RATES, strict=True):
        for now, of_base in zip(rates, base, strict=True):
            assert now == pytest.approx([of_base * scale for scale in scales])


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "LRRangeTest"])
def test_schedules_keep_the_ratios_in_deepspeeds_defaults(kind: str) -> None:
    from deepspeed.runtime import lr_schedules

    from ds_interlock.engine.parameter_groups import _with_rates

    config = {"scheduler": {"type": kind, "params": {"total_num_steps": 100} if "Decay" in kind else {}}}
    params = _with_rates(config, 1, [(0, 1.0), (0, 3.0)])["scheduler"]["params"]
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in (0.1, 0.3)]
    scheduler = getattr(lr_schedules, kind)(torch.optim.SGD(groups), **params)
    for _ in range(3):
        scheduler.step()
    one, other = scheduler.get_lr()
    assert other == pytest.approx(3 * one)
    assert one > 0


def resume(job: Job, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[float]]]:
    engine = scaled_engine(job)
    engine.train_batch(iter(micro_batches(job.num_micro_batches)))
    engine.save_checkpoint(folder)
    engine.train_batch(iter(micro_batches(job.num_micro_batches, seed=6)))
    engine.drain()
    undisturbed, rates = parameters_of(engine), [engine.get_lr()]
    engine.destroy()
    engine = scaled_engine(job)
    engine.load_checkpoint(folder)
    engine.train_batch(iter(micro_batches(job.num_micro_batches, seed=6)))
    engine.drain()
    resumed = parameters_of(engine)
    rates.append(engine.get_lr())
    engine.destroy()
    return undisturbed, resumed, rates


@pytest.mark.parametrize("extra", [{}, BF16, BF16_ZERO_1], ids=["fp32", "bf16", "bf16, ZeRO 1"])
def test_groups_that_differ_between_stages_can_be_saved_and_loaded(
    ranks4: RankPool, extra: dict[str, Any], tmp_path: Any
) -> None:
    job = Job(INTERLOCK, extra=extra | WARMUP)
    for undisturbed, resumed, rates in ranks4.run(resume, job=job, folder=str(tmp_path)):
        assert all(torch.equal(p, resumed[name]) for name, p in undisturbed.items())
        assert rates[0] == rates[1]
        assert len(rates[0]) == 2


def bad_values() -> list[Exception | None]:
    job = Job({**INTERLOCK, "head": {}})
    errors = []
    for value in (0.0, -1.0, float("nan"), "fast"):
        net = make_module(job)
        next(net.parameters()).learning_rate_scale = value
        errors.append(caught(_initialize, net, job))
    return errors


def _initialize(net: Any, job: Job, **more: Any) -> None:
    import ds_interlock

    ds_interlock.initialize(model=net, config=job.config(), **more)


@pytest.mark.bad_input
def test_a_scale_that_is_no_number_above_0(ranks4: RankPool) -> None:
    for errors in ranks4.run(bad_values):
        assert all(isinstance(error, ConfigError) for error in errors)
        assert [str(error).split(".learning_rate_scale is ")[1] for error in errors] == [
            f"{value}: expected a number above 0" for value in ("0.0", "-1.0", "nan", "'fast'")
        ]


def test_a_rate_that_a_function_has_is_scaled_too() -> None:
    net: Any = nn.Linear(2, 2)
    net.heads, net.placeholder, net.keeps_ties = nn.ModuleDict(), None, False
    net.head_parameters, net.layer_parameters = list, net.parameters
    net.bias.learning_rate_scale = 0.1
    groups, _ = with_groups_of_heads(net, partial(torch.optim.SGD, lr=0.5), None, {})
    rates = {group.get("lr", 0.5): group["params"] for group in groups}
    assert (rates[0.5], rates[0.05]) == ([net.weight], [net.bias])
    with pytest.raises(ConfigError, match="needs a rate to multiply"):
        with_groups_of_heads(net, torch.optim.SGD, None, {})


def groups_of_unequal_number() -> list[Exception | None]:
    together = {**INTERLOCK, "tied_weights": "sync"}
    return [
        caught(scaled_engine, Job({"mode": "global"}, extra=FP32_ZERO_1)),
        caught(make_engine, Job(together, tied=True, extra=BF16_ZERO_1)),
    ]


@pytest.mark.bad_input
def test_stages_that_step_together_need_equally_many_groups_under_zero(ranks4: RankPool) -> None:
    for of_global, of_heads in ranks4.run(groups_of_unequal_number):
        assert isinstance(of_global, ConfigError)
        assert "stage 0 has 2, stage 1 has 1, stage 2 has 1, stage 3 has 2;" in str(of_global)
        assert isinstance(of_heads, ConfigError)
        assert "stage 0 has 1, stage 1 has 2, stage 2 has 2, stage 3 has 1;" in str(of_heads)


def bring_an_optimizer() -> Exception | None:
    job = Job({**INTERLOCK, "head": {}})
    net = make_module(job)
    next(net.parameters()).learning_rate_scale = 2.0
    return caught(_initialize, net, job, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))


@pytest.mark.bad_input
def test_scales_need_the_optimizer_of_the_configuration(ranks4: RankPool) -> None:
    for error in ranks4.run(bring_an_optimizer):
        assert isinstance(error, ConfigError)
        assert "so does learning_rate_scale of a parameter; with an optimizer" in str(error)
