"""A schedule of plans, on real processes: the plan changes while training runs, and nothing else does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16,
    BF16_ZERO_1,
    FP32_ZERO_1,
    Job,
    assert_same,
    data_for,
    is_same,
    layers,
    loss_fn,
    make_engine,
    micro_batches,
    outcomes,
    parameters_of,
)
from ranks import RankPool
from torch import Tensor

from ds_interlock import InProcessPipeline, InterlockConfig
from ds_interlock.heads.factory import head_factory

HEAD = {"type": "norm_linear", "blocks": 1, "token_fraction": 0.4, "weight": 0.7}
WIDENING = [{"from_step": 0, "window": 1}, {"from_step": 2, "window": 2}, {"from_step": 4, "mode": "global"}]
THERE_AND_BACK = [
    {"from_step": 0, "window": 1.5, "combine": "farthest"},
    {"from_step": 2, "mode": "global"},
    {"from_step": 3, "window": 3},
    {"from_step": 5, "mode": "local"},
]
MOMENTUM = {"type": "SGD", "params": {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.1}}
OPTIMIZERS = pytest.mark.parametrize(
    "extra", [{}, FP32_ZERO_1, BF16, BF16_ZERO_1], ids=["fp32", "fp32, ZeRO 1", "bf16", "bf16, ZeRO 1"]
)


def scheduled(phases: Sequence[dict[str, Any]], **section: object) -> dict[str, object]:
    return {"schedule": list(phases), **section}


# Many processes against one.


def train_from(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    before, data = parameters_of(engine), data_for(engine, job)
    losses = []
    for _ in range(job.num_batches):
        engine.train_batch(data)
        losses.append(float(engine.drain()))
    result = {"before": before, "after": parameters_of(engine), "losses": losses}
    engine.destroy()
    return result


def train_in_one_process(job: Job, start: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[float]]:
    specs, config = layers(), InterlockConfig.from_deepspeed(job.config())
    schedule = config.plan_schedule([0, 3, 6, 9, 11])
    built = [spec.build() for spec in specs]
    net = InProcessPipeline(built, loss_fn, schedule, head_factory(config.head, specs))
    net.load_state_dict(start)
    optimizer = torch.optim.SGD(net.parameters(), **MOMENTUM["params"])
    data, losses = micro_batches(job.num_batches * job.num_micro_batches), []
    for step in range(job.num_batches):
        net.change_plan(schedule.plan_at(step))
        optimizer.zero_grad()
        some = data[step * job.num_micro_batches : (step + 1) * job.num_micro_batches]
        losses.append(float(net.accumulate_gradients(some)[net.plan.final]))
        optimizer.step()
    return dict(net.named_parameters()), losses


@pytest.mark.parametrize("phases", [WIDENING, THERE_AND_BACK], ids=["widening", "there and back"])
def test_four_processes_against_one(ranks4: RankPool, phases):
    section = scheduled(phases, head={"type": "norm_linear", "weight": 0.7})
    job = Job(section, num_batches=7, extra={"optimizer": MOMENTUM, "gradient_clipping": 0.0})
    results = ranks4.run(train_from, job=job)
    start = {name: value for result in results for name, value in result["before"].items()}
    expected, losses = train_in_one_process(job, start)
    assert {name for result in results for name in result["after"]} == expected.keys()
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-5)
        for name, after in result["after"].items():
            torch.testing.assert_close(
                after, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert not torch.equal(after, start[name])


# What must not change anything.


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16, ZeRO 1"])
def test_phases_with_one_plan_are_that_plan(ranks4: RankPool, extra):
    phases = [{"from_step": step, "window": 2} for step in (0, 1, 3)]
    job = Job(None, dropout=0.3, extra=extra)
    several, one, other = outcomes(
        ranks4,
        job.but(section=scheduled(phases, head=HEAD)),
        job.but(section={"mode": "interlock", "window": 2, "head": HEAD}),
        job.but(section={"mode": "interlock", "window": 3, "head": HEAD}),
    )
    assert_same(several, one)
    assert not is_same(one, other)


@pytest.mark.parametrize(
    ("phases", "extra"), [(WIDENING, {}), (THERE_AND_BACK, BF16_ZERO_1)], ids=["widening", "there and back"]
)
def test_streaming(ranks4: RankPool, phases, extra):
    job = Job(None, dropout=0.3, num_batches=7, extra=extra)
    streaming, waiting = outcomes(
        ranks4,
        job.but(section=scheduled(phases, head=HEAD)),
        job.but(section=scheduled(phases, head=HEAD, streaming=False)),
    )
    assert_same(streaming, waiting)
    assert len({*waiting[0].returned}) == job.num_batches
    for stage in range(4):
        assert waiting[stage].returned == waiting[0].returned
        assert waiting[stage].final == waiting[0].returned[-1]
    if phases is WIDENING:  # stages do not stream under global
        assert [o.returned[4:] for o in streaming] == [o.returned[4:] for o in waiting]


def test_streaming_with_replicas(ranks4: RankPool):
    phases = [{"from_step": 0, "mode": "local"}, {"from_step": 2, "mode": "global"}]
    job = Job(None, num_stages=2, dropout=0.1, extra=BF16_ZERO_1)
    section = scheduled(phases, head={"type": "norm_linear", "learning_rate_scale": 3.0})
    assert_same(*outcomes(ranks4, job.but(section=section), job.but(section={**section, "streaming": False})))


# After the switch.


def inner(optimizer: Any) -> Any:
    """The optimizer that steps; DeepSpeed's give it flat copies of the parameters."""
    return getattr(optimizer, "optimizer", optimizer)


def state_of_layers(engine: Any) -> dict[str, Any]:
    optimizer = inner(engine.optimizer)
    trained = optimizer.param_groups[0]["params"]
    return {
        "parameters": {n: p for n, p in parameters_of(engine).items() if not n.startswith("heads.")},
        "trained": [p.detach().clone() for p in trained],
        "optimizer": [{name: value.clone() for name, value in optimizer.state[p].items()} for p in trained],
        "random": torch.get_rng_state(),
    }


def continue_from(engine: Any, state: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            parameter.copy_(state["parameters"][name])
        for parameter, value, of_it in zip(
            inner(engine.optimizer).param_groups[0]["params"],
            state["trained"],
            state["optimizer"],
            strict=True,
        ):
            parameter.copy_(value)
            inner(engine.optimizer).state[parameter] = of_it
    torch.set_rng_state(state["random"])


def before_and_after_global(job: Job) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """The layers of a run that turns to global after 3 batches, and those of a global run from there."""
    data = micro_batches(6 * job.num_micro_batches)
    engine = make_engine(job)
    switched = iter(data)
    for _ in range(3):
        engine.train_batch(switched)
    engine.drain()
    state = state_of_layers(engine)
    for _ in range(3):
        engine.train_batch(switched)
    engine.drain()
    after = {name: p for name, p in parameters_of(engine).items() if name in state["parameters"]}
    engine.destroy()

    engine = make_engine(job.but(section={"mode": "global"}))
    continue_from(engine, state)
    plain = iter(data[3 * job.num_micro_batches :])
    for _ in range(3):
        engine.train_batch(plain)
    engine.drain()
    expected = parameters_of(engine)
    engine.destroy()
    unchanged = sum(torch.equal(value, state["parameters"][name]) for name, value in after.items())
    return after, expected, unchanged


@OPTIMIZERS
def test_after_the_switch_to_global_it_is_a_global_run(ranks4: RankPool, extra):
    phases = [{"from_step": 0, "window": 2}, {"from_step": 3, "mode": "global"}]
    job = Job(scheduled(phases, head={"learning_rate_scale": 2.0}), dropout=0.2, extra=extra)
    for after, expected, unchanged in ranks4.run(before_and_after_global, job=job):
        assert after.keys() == expected.keys()
        assert unchanged == 0
        for name, value in after.items():
            assert torch.equal(value, expected[name]), name


# What else follows the plan.


def reports_and_evaluations(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    data, seen = data_for(engine, job), []
    for _ in range(job.num_batches):
        engine.train_batch(data)
        engine.drain()
        _, losses = engine.eval_batch(iter(micro_batches(2)), num_micro_batches=2, return_head_losses=True)
        seen.append(
            {
                "reported": sorted(engine.stage_losses()),
                "evaluated": sorted(losses),
                "streaming": engine.streaming,
                "in plan": len(engine.plan.heads),
            }
        )
    engine.destroy()
    return {"seen": seen}


def test_reports_and_evaluations_follow_the_plan(ranks4: RankPool):
    job = Job(
        scheduled(
            [{"from_step": 0, "window": 1}, {"from_step": 1, "window": 2}, {"from_step": 2, "mode": "global"}]
        ),
        num_batches=3,
    )
    results = ranks4.run(reports_and_evaluations, job=job)
    local = ["final_loss", "loss_after_layer_3", "loss_after_layer_6", "loss_after_layer_9"]
    window_2 = ["final_loss", "loss_after_layer_6", "loss_after_layer_9"]
    # Reports are of the batch before; the plan is that of the next batch.
    assert [seen["evaluated"] for seen in results[0]["seen"]] == [window_2, ["final_loss"], ["final_loss"]]
    at = {"loss_after_layer_3": 0, "loss_after_layer_6": 1, "loss_after_layer_9": 2, "final_loss": 3}
    expected = [
        sorted(f"stage_{at[name]}/{name}" for name in names) for names in (local, window_2, ["final_loss"])
    ]
    assert [seen["reported"] for seen in results[0]["seen"]] == expected
    assert [seen["streaming"] for seen in results[2]["seen"]] == [True, False, False]
    assert [seen["in plan"] for seen in results[3]["seen"]] == [3, 1, 1]


def fitted_heads(job: Job) -> dict[str, Tensor]:
    engine = make_engine(job)
    before = {name: p.detach().clone() for name, p in engine.module.heads.named_parameters()}
    engine.fit_heads(data_for(engine, job), job.num_batches)
    engine.drain()
    places = [head.after_layer for head in engine.module.schedule.heads]
    after = {
        f"{places[int(name.split('.')[0])]}.{name.partition('.')[2]}": p.detach().clone()
        for name, p in engine.module.heads.named_parameters()
    }
    assert not any(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))
    engine.destroy()
    return after


def test_warm_up_fits_the_heads_of_all_phases(ranks4: RankPool):
    job = Job({"mode": "local"}, num_batches=2)
    phases = [{"from_step": 0, "mode": "global"}, {"from_step": 2, "window": 1}]
    expected = ranks4.run(fitted_heads, job=job)
    assert sum(map(len, expected)) > 0
    for result, heads in zip(
        ranks4.run(fitted_heads, job=job.but(section=scheduled(phases))), expected, strict=True
    ):
        assert result.keys() == heads.keys()
        assert all(torch.equal(value, heads[name]) for name, value in result.items())


def ties(job: Job) -> tuple[list[bool], Tensor | None]:
    engine = make_engine(job)
    data, streaming = data_for(engine, job), []
    for _ in range(job.num_batches):
        streaming.append(engine.streaming)
        engine.train_batch(data)
    engine.drain()
    embedding = parameters_of(engine).get("tied_modules.embedding.weight")
    engine.destroy()
    return streaming, embedding


@pytest.mark.parametrize("tied_weights", ["untie", "sync"])
def test_tied_weights_are_settled_for_the_whole_run(ranks4: RankPool, tied_weights):
    phases = [{"from_step": 0, "mode": "global"}, {"from_step": 3, "window": 2}]
    job = Job(scheduled(phases, tied_weights=tied_weights), tied=True, num_batches=5)
    results = ranks4.run(ties, job=job)
    first, last = results[0][1], results[3][1]
    assert torch.equal(first, last) == (tied_weights == "sync")
    streams = tied_weights == "untie"
    assert results[1][0] == [False, False, False, streams, streams]
    in_global_phase = [torch.equal(*(r[1] for r in ranks4.run(ties, job=job.but(num_batches=2))[::3]))]
    assert in_global_phase == [tied_weights == "sync"]


def trace(job: Job) -> None:
    engine = make_engine(job)
    data = data_for(engine, job)
    for _ in range(job.num_batches):
        engine.train_batch(data)
    engine.drain()
    engine.destroy()


def test_a_trace_across_the_change_is_of_the_later_plan(ranks4: RankPool, tmp_path: Path):
    phases = [{"from_step": 0, "window": 2}, {"from_step": 3, "mode": "global"}]
    section = scheduled(phases, trace={"path": str(tmp_path / "trace"), "batches": [2, 5]})
    ranks4.run(trace, job=Job(section, num_batches=5))
    text = (tmp_path / "trace.json").read_text()
    assert "2B0" in text
    assert "I0" not in text, "relays are of the plan before"
