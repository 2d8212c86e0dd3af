"""``interlock.myopia`` on real processes: the cosines of one process, and a training that takes no notice."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16_ZERO_1,
    VOCABULARY,
    WIDTH,
    Block,
    Job,
    Outcome,
    assert_same,
    data_for,
    layers,
    loss_fn,
    make_engine,
    micro_batches,
    parameters_of,
)
from ranks import RankPool
from torch import Tensor, nn

from ds_interlock import InProcessPipeline, InterlockConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.stage.myopia import gradient_cosines

BOUNDS = [0, 3, 6, 9, 11]
HEAD = {"type": "norm_linear", "weight": 0.7}
FRACTIONAL = {"mode": "interlock", "window": 1.5, "head": HEAD}
MYOPIA = {"myopia": {"every": 2}}


def measure(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    before, data, cosines = parameters_of(engine), data_for(engine, job), []
    for _ in range(job.num_batches):
        engine.train_batch(data)
        engine.drain()
        cosines.append(engine.gradient_cosines())
    result = {"before": before, "after": parameters_of(engine), "cosines": cosines}
    engine.destroy()
    return result


def in_one_process(job: Job, parameters: dict[str, Tensor], batch: list[Any]) -> list[float]:
    specs, config = layers(), InterlockConfig.from_deepspeed(job.config())
    built = [spec.build() for spec in specs]
    net = InProcessPipeline(built, loss_fn, config.plan(BOUNDS), head_factory(config.head, specs))
    net.load_state_dict(parameters)
    return gradient_cosines(net, batch)


@pytest.mark.parametrize("section", [{"mode": "local"}, FRACTIONAL], ids=["local", "1.5"])
def test_four_processes_against_one(ranks4: RankPool, section):
    job = Job({**section, **MYOPIA}, num_batches=2)
    results = ranks4.run(measure, job=job)
    before = {name: value for result in results for name, value in result["before"].items()}
    expected = in_one_process(job, before, micro_batches(1))
    assert max(expected[:-2]) < 0.99
    first, second = results[0]["cosines"]
    assert list(first) == ["stage_0", "stage_1", "stage_2", "stage_3"]
    assert list(first.values()) == pytest.approx(expected, abs=1e-5)
    assert first["stage_3"] == 1.0
    assert second == first, "the second batch is not measured"
    assert all(result["cosines"] == [{}, {}] for result in results[1:])


def test_replicas_measure_their_mean_gradient(ranks4: RankPool):
    job = Job({"mode": "local", **MYOPIA}, num_stages=2, num_batches=1)
    (first,) = ranks4.run(measure, job=job)[0]["cosines"]
    alone = job.but(section={"mode": "local"}, num_batches=1)
    before = {n: v for r in ranks4.run(measure, job=alone) for n, v in r["before"].items()}
    specs, config = layers(), InterlockConfig.from_deepspeed(job.config())
    built, plan = [spec.build() for spec in specs], config.plan([0, 6, 11])
    net = InProcessPipeline(built, loss_fn, plan, head_factory(config.head, specs))
    net.load_state_dict(before)
    of_both = [micro_batches(1, replica=replica)[0] for replica in (0, 1)]
    assert list(first.values()) == pytest.approx(gradient_cosines(net, of_both), abs=1e-5)
    assert first["stage_0"] != pytest.approx(gradient_cosines(net, of_both[:1])[0], abs=1e-3)


class Normed(Block):
    """With a running mean, as batch norm has (which knows no bf16 on CPUs): to be left alone."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.register_buffer("running_mean", torch.zeros(WIDTH))

    def forward(self, hidden_btd: Tensor) -> Tensor:
        hidden_btd = super().forward(hidden_btd)
        mean_d = hidden_btd.mean((0, 1))
        self.running_mean.lerp_(mean_d.detach().float(), 0.1)
        return hidden_btd - mean_d


def train_normed(job: Job) -> Outcome:
    from deepspeed.pipe import LayerSpec

    ends = (LayerSpec(nn.Embedding, VOCABULARY, WIDTH), LayerSpec(nn.Linear, WIDTH, VOCABULARY))
    specs = [ends[0], *(LayerSpec(Normed) for _ in range(7)), LayerSpec(nn.LayerNorm, WIDTH), ends[1]]
    engine = make_engine(job, layers=specs)
    data = data_for(engine, job)
    returned = [float(engine.train_batch(data)) for _ in range(job.num_batches)]
    final = float(engine.drain())
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    means = [value for name, value in state.items() if name.endswith("running_mean")]
    assert all(value.any() for value in means)
    assert means or engine.is_last_stage()
    state["random"] = torch.get_rng_state()
    consumed = engine.consumed_micro_batches
    assert consumed == (job.num_batches * job.num_micro_batches if engine.is_first_stage() else 0)
    engine.destroy()
    return Outcome(returned, final, state)


@pytest.mark.parametrize(
    ("module", "extra"),
    [({}, BF16_ZERO_1), ({"seed_layers": True}, {})],
    ids=["bf16, ZeRO 1", "layers seeded"],
)
def test_training_takes_no_notice(ranks4: RankPool, extra, module):
    section = {
        "schedule": [
            {"from_step": 0, "window": 1.5},
            {"from_step": 2, "window": 3},
            {"from_step": 4, "mode": "global"},
        ],
        "head": {"type": "norm_linear", "token_fraction": 0.5},
    }
    job = Job(section, num_batches=5, extra=extra, module=module)
    without, measured = (
        ranks4.run(train_normed, job=each)
        for each in (job, job.but(section={**section, "myopia": {"every": 1}}))
    )
    assert_same(without, measured)


def read(folder: Path, stage: int) -> dict[int, float]:
    text = (folder / "runs" / f"Train_stage_{stage}_gradient_cosine.csv").read_text()
    return {int(samples): float(value) for samples, value in list(csv.reader(text.splitlines()))[1:]}


def test_the_monitor_is_told_every_nth_batch(ranks4: RankPool, tmp_path: Path):
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "runs"}}
    schedule = [{"from_step": 0, "window": 1}, {"from_step": 3, "mode": "global"}]
    job = Job({"schedule": schedule, "myopia": {"every": 2}}, num_batches=5, extra=monitor)
    results = ranks4.run(measure, job=job)
    for stage in range(4):
        reported = read(tmp_path, stage)
        assert list(reported) == [8, 24, 40]  # after batches 1, 3 and 5, of 4 micro-batches of 2
        assert reported[40] == 1.0, "nothing is hidden from a stage under global"
        assert all(-1 <= value <= 1 for value in reported.values())
        assert stage == 3 or max(reported[8], reported[24]) < 0.99
    assert set(results[0]["cosines"][-1].values()) == {1.0}


def test_a_stage_without_gradient_has_no_cosine(ranks4: RankPool):
    job = Job({"mode": "local", **MYOPIA}, num_batches=1)
    (cosines,) = ranks4.run(measure_frozen, job=job)[0]
    assert math.isnan(cosines["stage_1"])
    assert cosines["stage_3"] == 1.0


def measure_frozen(job: Job) -> list[dict[str, float]]:
    from test_frozen import STAGES, frozen_engine

    engine = frozen_engine(job, STAGES["middle"])
    engine.train_batch(data_for(engine, job))
    engine.drain()
    cosines = engine.gradient_cosines()
    engine.destroy()
    return [cosines]
