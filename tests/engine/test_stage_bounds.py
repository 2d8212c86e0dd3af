"""Stages cut where the user says."""

from typing import Any

import pytest
import torch
from engine_jobs import Job, data_for, make_engine, make_module, parameters_of
from ranks import RankPool, caught

from ds_interlock import ConfigError

BOUNDS = [0, 2, 3, 8, 11]
INTERLOCK = {"mode": "interlock", "window": 2}


def train_cut_at(job: Job, stage_bounds: list[int], folder: str) -> dict[str, Any]:
    cut: dict[str, Any] = {"stage_bounds": stage_bounds, "partition_method": None}
    engine = make_engine(job, **cut)
    engine.train_batch(data_for(engine, job))
    loss = float(engine.drain())
    engine.save_checkpoint(folder)
    trained = parameters_of(engine)
    engine.destroy()
    engine = make_engine(job, **cut)
    engine.load_checkpoint(folder)
    loaded = parameters_of(engine)
    owners = [engine.module.stage_owner(layer) for layer in range(11)]
    engine.destroy()
    return {"loss": loss, "trained": trained, "loaded": loaded, "owners": owners, "plan": engine.plan}


def test_stages_get_the_layers_they_are_given(ranks4: RankPool, tmp_path: Any) -> None:
    job = Job(INTERLOCK, num_batches=1)
    results = ranks4.run(train_cut_at, job=job, stage_bounds=BOUNDS, folder=str(tmp_path))
    for stage, result in enumerate(results):
        layers = {int(name.split(".")[0]) for name in result["trained"] if not name.startswith("heads.")}
        assert layers == set(range(BOUNDS[stage], BOUNDS[stage + 1]))
        assert result["owners"] == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3]
        assert list(result["plan"].stage_bounds) == BOUNDS
        assert result["loss"] == results[0]["loss"]
        assert all(torch.equal(p, result["loaded"][name]) for name, p in result["trained"].items())


def test_the_same_bounds_make_the_same_pipeline(ranks4: RankPool, tmp_path: Any) -> None:
    job = Job({"mode": "global"}, num_batches=1)
    explicit = ranks4.run(train_cut_at, job=job, stage_bounds=[0, 3, 6, 9, 11], folder=str(tmp_path))
    for one, other in zip(explicit, ranks4.run(train_uniformly, job=job), strict=True):
        assert all(torch.equal(p, other[name]) for name, p in one["trained"].items())


def train_uniformly(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    engine.train_batch(data_for(engine, job))
    engine.drain()
    return parameters_of(engine)


def build_with(stage_bounds: list[int], partition_method: str | None) -> Exception | None:
    return caught(make_module, Job(INTERLOCK), stage_bounds=stage_bounds, partition_method=partition_method)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("stage_bounds", "partition_method", "message"),
    [
        ([0, 3, 3, 9, 11], None, "stage_bounds [0, 3, 3, 9, 11]: expected rising numbers from 0 to 11"),
        ([1, 3, 6, 9, 11], None, "stage_bounds [1, 3, 6, 9, 11]: expected rising numbers from 0 to 11"),
        ([0, 3, 6, 9, 12], None, "stage_bounds [0, 3, 6, 9, 12]: expected rising numbers from 0 to 11"),
        ([], None, "stage_bounds []: expected rising numbers from 0 to 11"),
        ([0, 3, 11], None, "stage_bounds [0, 3, 11]: expected 5 numbers for 4 stages"),
        (BOUNDS, "uniform", "got both stage_bounds and partition_method: leave out one of them"),
    ],
)
def test_bounds_that_make_no_cut(
    ranks4: RankPool, stage_bounds: list[int], partition_method: str | None, message: str
) -> None:
    for error in ranks4.run(build_with, stage_bounds=stage_bounds, partition_method=partition_method):
        assert isinstance(error, ConfigError)
        assert str(error).startswith(message)
