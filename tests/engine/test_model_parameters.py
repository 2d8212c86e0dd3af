"""``model_parameters=`` and ``optimizer=`` as scripts pass them: heads join, or an error says what to add."""

from collections.abc import Callable, Iterator
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
    make_module,
    parameters_of,
)
from ranks import RankPool, caught
from torch import Tensor, nn

import ds_interlock
from ds_interlock import ConfigError

LOCAL = {"mode": "local"}
SCALED = {"mode": "interlock", "window": 2, "head": {"learning_rate_scale": 3.0}}
PHASES = {"schedule": [{"from_step": 0, "window": 1}, {"from_step": 1, "window": 2}]}
FREE = {"gradient_clipping": 0.0}  # ZeRO adds up its norm group by group
FROZEN = ("0", "1", "2")
"""The layers of stage 0 of 4."""


def as_the_tutorial_does(net: nn.Module) -> dict[str, Any]:
    return {"model_parameters": [p for p in net.parameters() if p.requires_grad]}


def as_a_generator(net: nn.Module) -> dict[str, Any]:
    return {"model_parameters": (p for p in net.parameters() if p.requires_grad)}


def as_groups(net: nn.Module) -> dict[str, Any]:
    def named(like: Callable[[str], bool]) -> Iterator[nn.Parameter]:
        return (p for n, p in net.named_parameters() if p.requires_grad and like(n))

    groups = [
        {"params": named(lambda name: not name.endswith("bias")), "weight_decay": 0.01},
        {"params": named(lambda name: name.endswith("bias")), "lr": 1e-2},
    ]
    return {"model_parameters": groups}


def with_a_function(net: nn.Module) -> dict[str, Any]:
    groups = [{**group, "lr": 1e-2} for group in as_groups(net)["model_parameters"]]
    return {"model_parameters": groups, "optimizer": make_adam}


def make_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def train_as(job: Job, frozen: bool, how: Callable[[Any], dict[str, Any]] | None) -> dict[str, Any]:
    """Trains with what ``how`` makes before the heads exist; without it with neither argument."""
    net = make_module(job, **({} if how is None else {"interlock": None}))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not frozen or name.split(".")[0] not in FROZEN)
    arguments = {} if how is None else how(net)
    engine, *_ = ds_interlock.initialize(model=net, config=job.config(), **arguments)
    before, data = parameters_of(engine), data_for(engine, job)
    for _ in range(job.num_batches):
        engine.train_batch(data)
    engine.drain()
    heads = {f"heads.{name}" for name, _ in engine.module.heads.named_parameters()}
    after = parameters_of(engine)
    learned = {name for name in heads if not torch.equal(after[name], before[name])}
    rates = engine.get_lr()
    engine.destroy()
    return {"after": after, "untrained": heads - learned, "rates": sorted(set(rates)), "heads": heads}


def train_in_each_way(job: Job, frozen: bool, ways: list[Any]) -> list[dict[str, Any]]:
    return [train_as(job, frozen, how) for how in (None, *ways)]


def different(some: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    return [name for name, value in some.items() if not torch.equal(value, others[name])]


WAYS = [as_the_tutorial_does, as_a_generator, as_groups, with_a_function]


@pytest.mark.parametrize(
    ("section", "extra", "frozen", "ways"),
    [
        (LOCAL, BF16, True, WAYS[:1]),
        (SCALED, WARMUP, False, WAYS),
        (SCALED, FP32_ZERO_1 | WARMUP, True, WAYS[:1]),
        (PHASES, BF16_ZERO_1, False, WAYS[1:3]),
        ({"mode": "interlock", "window": 1.5}, BF16_ZERO_1, False, WAYS[:1]),
    ],
    ids=[
        "local, bf16, a frozen stage",
        "window 2, rates",
        "window 2, rates, ZeRO 1, a frozen stage",
        "phases, bf16, ZeRO 1",
        "window 1.5, bf16, ZeRO 1",
    ],
)
def test_heads_join(ranks4: RankPool, section, extra, frozen, ways):
    """As if the script had left the parameters to the engine, bit for bit, also in rates and phases."""
    job = Job(section, num_batches=2, extra=extra | FREE)
    for results in ranks4.run(train_in_each_way, job=job, frozen=frozen, ways=ways):
        for how, result in zip(ways, results[1:], strict=True):
            assert not different(result["after"], results[0]["after"]), how
            assert result["rates"] == results[0]["rates"], how
            # Window 2 leaves a head of local unused, but only from the second batch on.
            assert not result["untrained"], how


def initialize_with(job: Job, **arguments: Callable[[nn.Module], Any]) -> Exception | None:
    net = make_module(job, interlock=None)
    made = {name: make(net) for name, make in arguments.items()}
    return caught(ds_interlock.initialize, model=net, config=job.config(), **made)


def biases(net: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in net.named_parameters() if n.endswith("bias")]


def adam_of_the_layers(net: nn.Module) -> torch.optim.Optimizer:
    return make_adam(net.parameters())


@pytest.mark.bad_input
@pytest.mark.parametrize("extra", [{}, BF16, BF16_ZERO_1], ids=["fp32", "bf16", "bf16, ZeRO 1"])
def test_heads_that_cannot_join_are_an_error_on_every_rank(ranks4: RankPool, extra):
    job = Job({"mode": "interlock", "window": 2}, extra=extra)
    for error in ranks4.run(initialize_with, job=job, optimizer=adam_of_the_layers):
        assert isinstance(error, ConfigError)
        assert "the optimizer does not train the heads (0." in str(error)
        assert "add model.head_parameters() to the optimizer" in str(error)
    for error in ranks4.run(initialize_with, job=job, model_parameters=biases):
        assert isinstance(error, ConfigError)
        assert "model_parameters lacks some of what learns in the layers of stage 1 (3." in str(error)


def test_without_heads_a_script_may_train_what_it_likes(ranks4: RankPool):
    assert not any(ranks4.run(initialize_with, job=Job({"mode": "global"}), model_parameters=biases))
