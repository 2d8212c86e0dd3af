"""What reaches DeepSpeed's monitor, and that it is about the right batch."""

import csv
import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from engine_jobs import (
    BF16_ZERO_1,
    WARMUP,
    Job,
    data_for,
    layers,
    loss_fn,
    make_engine,
    micro_batches,
    parameters_of,
)
from ranks import RankPool
from torch import Tensor

from ds_interlock import InProcessPipeline, InterlockConfig
from ds_interlock.heads.factory import head_factory

INTERLOCK = {"mode": "interlock", "window": 2, "head": {"token_fraction": 0.5}}
NUM_BATCHES = 6
SAMPLES = [8 * batch for batch in range(1, NUM_BATCHES + 1)]  # 4 micro-batches of 2


def monitored(job: Job, folder: Path) -> Job:
    monitors = {
        name: {"enabled": True, "output_path": str(folder), "job_name": name}
        for name in ("csv_monitor", "tensorboard")
    }
    return job.but(extra={**WARMUP, **job.extra, **monitors})


def train_and_report(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    data = data_for(engine, job)
    returned, rates = [], []
    for _ in range(job.num_batches):
        rates.append(engine.get_lr()[0])
        returned.append(float(engine.train_batch(data)))
    final = float(engine.drain())
    losses = engine.stage_losses()
    engine.destroy()
    return {"returned": returned, "final": final, "rates": rates, "stage_losses": losses}


def read(folder: Path) -> dict[str, dict[int, float]]:
    """The values of every CSV file by sample count."""
    reports = {}
    for path in sorted((folder / "csv_monitor").glob("*.csv")):
        header, *rows = csv.reader(path.read_text().splitlines())
        assert header[0] == "step"
        values = {int(step): float(value) for step, value in rows}
        assert len(values) == len(rows), f"{path.name} has a sample count twice"
        reports[path.stem] = values
    return reports


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16, ZeRO 1"])
def test_every_stage_reports_every_batch_in_its_place(ranks4: RankPool, tmp_path: Path, extra):
    job = Job(INTERLOCK, num_batches=NUM_BATCHES, dropout=0.2, extra=extra)
    exact_folder, folder = tmp_path / "exact", tmp_path / "streaming"
    exact_job = monitored(job.but(section={**INTERLOCK, "streaming": False}), exact_folder)
    exact = ranks4.run(train_and_report, job=exact_job)[0]
    streaming = ranks4.run(train_and_report, job=monitored(job, folder))[0]
    reports = read(folder)

    own = {stage: ["gradient_norm", "learning_rate"] for stage in range(4)}
    own[1].append("loss_after_layer_6")
    own[2].append("loss_after_layer_9")
    own[3].append("final_loss")
    for stage, names in own.items():
        for name in names:
            values = reports[f"Train_stage_{stage}_{name}"]
            assert list(values) == SAMPLES
            assert all(value > 0 and math.isfinite(value) for value in values.values()), name
        assert list(reports[f"Train_stage_{stage}_learning_rate"].values()) == pytest.approx(exact["rates"])
    assert sum("loss" in name for name in reports) == 4, "no stage reports a loss that it has not"
    assert len(set(exact["rates"])) > 1, "the rate must move"

    assert list(reports["Train_Samples_train_loss"].items()) == list(
        zip(SAMPLES, exact["returned"], strict=True)
    )
    stage_reports = {name: values for name, values in reports.items() if name.startswith("Train_stage")}
    assert stage_reports == {n: v for n, v in read(exact_folder).items() if n.startswith("Train_stage")}
    assert streaming["final"] == exact["final"] == exact["returned"][-1]
    assert streaming["stage_losses"] == {
        f"stage_{stage}/{name}": reports[f"Train_stage_{stage}_{name}"][SAMPLES[-1]]
        for stage, names in own.items()
        for name in names
        if "loss" in name
    }


STAND_INS = {
    "wandb": """
steps = [0]
def init(**about): note(about, None)
def log(data, step, commit):
    assert step >= steps[-1], "the real one drops it"
    steps.append(step)
    note(data, step)
""",
    "comet_ml": """
__version__ = "3.50.0"
class Experiment:
    def __internal_api__log_metric__(self, name, value, step): note({name: value}, step)
def start(**about):
    note(about, None)
    return Experiment()
""",
}
NOTE = """
import json, pathlib
def note(values, step):
    with pathlib.Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps([values, step]) + "\\n")
"""


def train_with_stand_ins(job: Job, folder: Path) -> dict[str, Any]:
    """An evaluation comes between two batches, with a report of one stage that is held up."""
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        engine = make_engine(job)
        data = data_for(engine, job)
        reporter = engine._progress.reporter
        post, late = reporter.post, list[Any]()
        if engine.stage_id == 1:
            reporter.post = lambda *report: late.append(report)
        for _ in range(job.num_batches - 1):
            engine.train_batch(data)
        engine.eval_batch(iter(micro_batches(1)), num_micro_batches=1)
        for report in late:
            post(*report)
        reporter.post = post
        engine.train_batch(data)
        final = float(engine.drain())
        engine.destroy()
        return {"final": final}


def test_other_monitors_have_the_same(ranks4: RankPool, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, code in STAND_INS.items():
        (tmp_path / f"{name}.py").write_text(NOTE + code)
    job = monitored(Job({"mode": "local"}, num_micro_batches=1, num_batches=3), tmp_path)
    others = {
        "wandb": {"enabled": True, "project": "some"},
        "comet": {"enabled": True, "project": "some", "samples_log_interval": 1},
    }
    job = job.but(extra={**job.extra, **others})
    result = ranks4.run(train_with_stand_ins, job=job, folder=tmp_path)[0]
    by_sample = {name: list(values.items()) for name, values in read(tmp_path).items()}
    for module in STAND_INS:
        (about, _), *logged = map(json.loads, (tmp_path / f"{module}.jsonl").read_text().splitlines())
        assert about["project"] == "some"
        own: dict[str, list[tuple[int, float]]] = {}
        for values, step in logged:
            for name, value in values.items():
                own.setdefault(name.replace("/", "_"), []).append((step, value))
        assert own == by_sample
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("Train/Samples/eval_loss")] == [4]
    final = events.Scalars("Train/Samples/train_loss")
    assert [event.step for event in final] == [2, 4, 6]
    assert final[-1].value == pytest.approx(result["final"])
    for stage in range(4):
        loss = "final_loss" if stage == 3 else f"loss_after_layer_{3 * stage + 3}"
        for name in (loss, "gradient_norm", "learning_rate"):
            assert [event.step for event in events.Scalars(f"Train/stage_{stage}/{name}")] == [2, 4, 6]


# The values themselves.


def first_batch(job: Job) -> tuple[dict[str, Tensor], dict[str, float], Any]:
    engine = make_engine(job)
    before = parameters_of(engine)
    engine.train_batch(data_for(engine, job))
    engine.drain()
    losses, plan = engine.stage_losses(), engine.plan
    engine.destroy()
    return before, losses, plan


@pytest.mark.parametrize("num_stages", [4, 2])
def test_losses_and_norms_are_those_of_one_process(ranks4: RankPool, tmp_path: Path, num_stages):
    section = {"mode": "local", "head": {"type": "linear", "weight": 0.7}}
    job = monitored(Job(section, num_stages=num_stages, num_micro_batches=3, num_batches=1), tmp_path)
    results = ranks4.run(first_batch, job=job)
    plan = results[0][2]
    specs = layers()
    head = head_factory(InterlockConfig.from_deepspeed(job.config()).head, specs)
    net = InProcessPipeline([spec.build() for spec in specs], loss_fn, plan, head)
    net.load_state_dict({name: value for before, _, _ in results for name, value in before.items()})
    num_replicas = 4 // num_stages
    batch = [mb for replica in range(num_replicas) for mb in micro_batches(3, replica=replica)]
    losses = net.accumulate_gradients(batch)

    names = [f"stage_{h.stage}/loss_after_layer_{h.after_layer}" for h in plan.heads[:-1]]
    names.append(f"stage_{num_stages - 1}/final_loss")
    expected = {name: float(losses[loss]) for loss, name in enumerate(names)}
    assert results[0][1] == pytest.approx(expected, rel=1e-6)
    assert all(other == {} for _, other, _ in results[1:]), "reports are gathered on rank 0"
    reports = read(tmp_path)
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    for stage in range(num_stages):
        of_stage = [gradients[name] for name in results[stage * num_replicas][0]]
        norm = float(torch.nn.utils.get_total_norm(of_stage))
        (reported,) = reports[f"Train_stage_{stage}_gradient_norm"].values()
        assert reported == pytest.approx(norm, rel=1e-5)


def two_engines_at_once(jobs: tuple[Job, Job]) -> list[list[float]]:
    """Trains two engines in turns; what each returned."""
    engines = [make_engine(job) for job in jobs]
    data = [data_for(engine, job) for engine, job in zip(engines, jobs, strict=True)]
    returned: list[list[float]] = [[], []]
    for _ in range(jobs[0].num_batches):
        for number, engine in enumerate(engines):
            returned[number].append(float(engine.train_batch(data[number])))
            engine.drain()
    return returned


def test_two_engines_in_one_process_keep_their_reports_apart(ranks4: RankPool):
    jobs = (
        Job({"mode": "local"}, num_batches=4),
        Job({"mode": "interlock", "window": 3}, num_batches=4, num_micro_batches=3),
    )
    exact = [
        ranks4.run(train_and_report, job=job.but(section={**job.section, "streaming": False}))[0]["returned"]
        for job in jobs
        if job.section is not None
    ]
    assert not set(exact[0]) & set(exact[1])
    for returned in ranks4.run(two_engines_at_once, jobs=jobs):
        for values, allowed in zip(returned, exact, strict=True):
            assert {value for value in values if value == value} <= set(allowed)


# Batches much shorter than the pauses of the reporting thread.


def train_fast(jobs: list[Job]) -> list[dict[str, Any]]:
    """What arrives during many batches of a few milliseconds, and soon after them."""
    return [_train_fast(job) for job in jobs]


def _train_fast(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    data, reporter = data_for(engine, job), engine._progress.reporter
    returned = [float(engine.train_batch(data)) for _ in range(job.num_batches)]
    waiting = reporter._reports.qsize()
    engine.drain()
    engine.destroy()
    return {"returned": returned, "waiting": waiting}


def test_reports_of_short_batches_do_not_pile_up(ranks2: RankPool):
    sections: list[dict[str, Any]] = [
        {"mode": "global"},
        {"mode": "local"},
        {"mode": "interlock", "window": 1.5},
    ]
    tiny = {"layers": layers(num_blocks=2)}
    jobs = [Job(each, num_stages=2, num_micro_batches=1, num_batches=60, module=tiny) for each in sections]
    for by_job in ranks2.run(train_fast, jobs=jobs):
        for job, result in zip(jobs, by_job, strict=True):
            assert result["waiting"] < job.num_batches / 2, job.section
            assert not all(map(math.isnan, result["returned"])), job.section


def train_while_the_thread_stalls(job: Job) -> tuple[float, int, dict[str, float]]:
    """Seconds that the batches took on rank 0, whose thread stalls for one; reports that then waited."""
    engine = make_engine(job)
    reporter = engine._progress.reporter
    exchange, goes_on = reporter._exchange, threading.Event()
    reporter._reports.maxsize = 4

    def stall(reports: Any) -> None:
        goes_on.wait()
        exchange(reports)

    reporter._exchange = stall
    threading.Timer(1.0 if engine.global_rank == 0 else 0.0, goes_on.set).start()
    data, started, most = data_for(engine, job), time.monotonic(), 0
    for _ in range(job.num_batches):
        engine.train_batch(data)
        most = max(most, reporter._reports.qsize())
    seconds = time.monotonic() - started
    engine.drain()
    losses = engine.stage_losses()
    engine.destroy()
    return seconds, most, losses


def test_a_stalled_reader_stops_its_stage_and_loses_nothing(ranks2: RankPool, tmp_path: Path):
    job = Job({"mode": "local"}, num_stages=2, num_micro_batches=1, num_batches=20)
    (seconds, most, losses), _ = ranks2.run(train_while_the_thread_stalls, job=monitored(job, tmp_path))
    assert seconds > 0.9
    assert most <= 4
    assert len(losses) == 2
    every = [2 * batch for batch in range(1, 21)]
    assert all(list(values) == every for values in read(tmp_path).values())
