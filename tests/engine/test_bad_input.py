"""Bad input on real ranks: one clear error where it is known, and no rank waits for ever."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.engine import PipelineError
from deepspeed.utils import logger
from engine_jobs import VOCABULARY, WIDTH, Job, layers, make_engine, make_module, micro_batches
from ranks import RankPool, caught
from torch import nn

import ds_interlock
from ds_interlock import ConfigError, DataError, LossHead, PeerError
from ds_interlock.engine.data import TrainingData

TIMEOUT_SECONDS = 1.0
SOON = 40.0
"""Seconds that show that nothing waited for the process groups' own limits, which are over 60."""
INTERLOCK = {"mode": "interlock", "window": 2, "timeout_seconds": TIMEOUT_SECONDS}
LOCAL = {"mode": "local", "timeout_seconds": TIMEOUT_SECONDS}
GLOBAL = {"mode": "global", "timeout_seconds": TIMEOUT_SECONDS}


# During training: one rank knows what is wrong, the others notice that it is silent.


def train_badly(job: Job, make_data: Callable[[], Any], **module: Any) -> tuple[Exception | None, float]:
    engine = make_engine(job, **module)
    torch.distributed.barrier()
    start = time.monotonic()
    error = caught(engine.train_batch, make_data())
    seconds = time.monotonic() - start
    torch.distributed.barrier()
    return error, seconds


# Silent; or already gone, if it has left before the others' time is up.
_NEIGHBOUR_IS_GONE = r"^stage \d \(rank \d\) stopped in batch 1: stage \d \(rank \d\) "


def assert_one_knows(
    results: list[tuple[Exception | None, float]], rank: int, kind: type[Exception], *says: str
) -> None:
    """``rank`` raised ``kind``; the others, if anything, that a neighbour is silent or gone, and soon."""
    known, _ = results[rank]
    assert type(known) is kind, known
    for text in says:
        assert re.search(text, str(known)), known
    for other, (error, seconds) in enumerate(results):
        assert seconds < SOON
        if other != rank:
            assert error is None or isinstance(error, PeerError)
            assert error is None or re.search(_NEIGHBOUR_IS_GONE, str(error)), error
    assert any(isinstance(error, PeerError) for error, _ in results), "a rank must have waited"


def too_few() -> Iterator[Any]:
    return iter(micro_batches(2))


def dictionaries() -> Iterator[Any]:
    return iter([{"inputs": 1, "labels": 2}] * 4)


def lists_of_numbers() -> Iterator[Any]:
    return iter([([1, 2], torch.tensor([1, 2]))] * 4)


def nothing() -> None:
    return None


@pytest.mark.bad_input
@pytest.mark.parametrize("section", [GLOBAL, LOCAL, INTERLOCK], ids=["global", "local", "interlock"])
def test_data_that_runs_dry_within_a_batch(ranks4: RankPool, section):
    results = ranks4.run(train_badly, job=Job(section), make_data=too_few)
    assert_one_knows(results, 0, DataError, "ended in the middle of a batch", "takes 4", "RepeatingLoader")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make_data", "says"),
    [
        (dictionaries, "gave dict where a pair"),
        (lists_of_numbers, "a tensor or a tuple of tensors, got list"),
        (nothing, "stage 0 has no data"),
    ],
)
def test_batches_of_another_form(ranks4: RankPool, make_data, says):
    results = ranks4.run(train_badly, job=Job(INTERLOCK), make_data=make_data)
    assert_one_knows(results, 0, DataError, says)


def test_what_data_says_and_reads(monkeypatch: pytest.MonkeyPatch):
    triple = torch.ones(2), torch.zeros(2), "ignored, as by DeepSpeed"
    labelled = torch.ones(2), {"ids": torch.zeros(2)}
    engine = SimpleNamespace(batch_fn=None, micro_batches=4, data_iterator=iter([triple, labelled]))
    engine.module, engine.training_dataloader = SimpleNamespace(training=True), None
    engine.train_micro_batch_size_per_gpu = lambda: 2
    ranks = SimpleNamespace(device=torch.device("cpu"), is_first_stage=True, num_replicas=1)
    data = TrainingData(engine, ranks)  # type: ignore[arg-type]
    assert [part.tolist() for part in data.load(0)] == [[1, 1], [0, 0]]
    with pytest.raises(DataError, match="a tensor or a tuple of tensors, got dict"):
        data.load(1)
    with pytest.raises(DataError, match="ended in the middle of a batch"):
        data.load(1)
    with pytest.raises(DataError, match="ended before a batch, which takes 4"):
        data.load(0)
    warnings: list[str] = []
    monkeypatch.setattr(logger, "warning", warnings.append)
    data.restore({"consumed_micro_batches": 3, "data_iterator": {"position": 3}})
    data.restore({"consumed_micro_batches": 3, "data_iterator": None})
    assert ["set_dataiterator before load_checkpoint" in warning for warning in warnings] == [True, False]
    assert all("skip 3 micro-batches" in warning for warning in warnings)


def narrow_on_stage_1(head: LossHead) -> nn.Module:
    return nn.Linear(WIDTH, 2 if head.stage == 1 else VOCABULARY)


class Unreduced(nn.Linear):
    """A head that gives a loss of its own, one a position."""

    def loss(self, hidden: Any, labels: Any, loss_fn: Any) -> Any:
        return self(hidden)


def unreduced_on_stage_2(head: LossHead) -> nn.Module:
    return (Unreduced if head.stage == 2 else nn.Linear)(WIDTH, VOCABULARY)


def full_batch() -> Iterator[Any]:
    return iter(micro_batches(4))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("head", "rank", "says"),
    [
        (narrow_on_stage_1, 1, r"head after layer 6 \(stage 1\) failed.*shape \(2, 5, 8\).*out of bounds"),
        (unreduced_on_stage_2, 2, r"head after layer 9 \(stage 2\) gave \(2, 5, 11\): expected one number"),
    ],
)
def test_a_head_whose_output_does_not_fit_the_loss(ranks4: RankPool, head, rank, says):
    results = ranks4.run(train_badly, job=Job(INTERLOCK), make_data=full_batch, head=head)
    assert_one_knows(results, rank, ConfigError, says)


# Before training: every rank says the same.


def build(job: Job, on_rank: dict[int, Job] | None = None, **module: Any) -> Exception | None:
    own = (on_rank or {}).get(torch.distributed.get_rank(), job)
    return caught(make_engine, own, **module)


def assert_all_say(errors: list[Exception | None], *says: str) -> None:
    for error in errors:
        assert isinstance(error, ConfigError), error
        for text in says:
            assert re.search(text, str(error)), error


@pytest.mark.bad_input
def test_ranks_with_different_configs(ranks4: RankPool):
    job = Job(INTERLOCK)
    other = job.but(section={**INTERLOCK, "window": 3}, extra={"gradient_clipping": 0.9})
    assert_all_say(
        ranks4.run(build, job=job, on_rank={2: other}),
        r"config\.interlock\.window is 2 on rank 0, 3 on rank 2",
        r"config\.gradient_clipping is 0\.1 on rank 0, 0\.9 on rank 2",
        "2 faults",
        "same JSON file",
    )


def train_with_settings_of_its_own(jobs: list[Job], folder: str) -> list[float]:
    """Trains where every rank has other values of what is a rank's own affair."""
    rank = torch.distributed.get_rank()
    own = {"local_rank": rank, "output_dir": f"{folder}/{rank}", "run": {"name": f"run {rank}"}}
    own |= {"steps_per_print": 1 + rank, "wall_clock_breakdown": rank == 1, "memory_breakdown": rank == 2}
    own["csv_monitor"] = {"enabled": rank == 0, "output_path": folder, "job_name": f"job {rank}"}
    trace = {"path": f"{folder}/{rank}", "batches": [1, 2]}
    losses = []
    for job in jobs:
        section = {**job.section, "trace": trace, "timeout_seconds": 100.0 + rank}  # type: ignore[dict-item]
        engine = make_engine(job.but(section=section, extra=own))
        engine.train_batch(full_batch())
        losses.append(float(engine.drain()))
        engine.destroy()
    return losses


@pytest.mark.bad_input
def test_settings_that_may_differ_between_ranks(ranks4: RankPool, tmp_path: Path):
    jobs = [Job({"mode": "global"}), Job({"mode": "local"}), Job({"mode": "interlock", "window": 2})]
    losses = ranks4.run(train_with_settings_of_its_own, jobs=jobs, folder=str(tmp_path))
    assert all(of_rank == losses[0] for of_rank in losses)


@pytest.mark.bad_input
def test_ranks_with_different_models(ranks4: RankPool):
    job = Job({**INTERLOCK, "window": 3})
    errors = ranks4.run(build_with_more_layers_on, rank=3, job=job)
    assert_all_say(errors, "layers is 11 on rank 0, 12 on rank 3", "stage_bounds")


def build_with_more_layers_on(rank: int, job: Job) -> Exception | None:
    num_blocks = 9 if torch.distributed.get_rank() == rank else 8
    return caught(make_engine, job, layers=layers(num_blocks=num_blocks))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"fp16": {"enabled": True}}, r"fp16\.enabled"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage: 2"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage: 3"),
        ({"pipeline": {"use_reentrant": True}}, r"pipeline\.use_reentrant"),
    ],
)
def test_deepspeed_settings_that_are_refused(ranks4: RankPool, extra, says):
    assert_all_say(ranks4.run(build, job=Job(INTERLOCK, extra=extra)), says)


@pytest.mark.bad_input
def test_more_stages_than_layers(ranks4: RankPool):
    errors = ranks4.run(build, job=Job(INTERLOCK), layers=layers(num_blocks=0))
    assert_all_say(errors, "4 stages for 3 layers", "num_stages=3")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"window": 5}, [r"interlock\.window 5", "between 1 .local. and 4"]),
        ({"window": 2, "head_stride": 3}, [r"interlock\.head_stride 3", "at most 2"]),
        ({"window": 0.5}, [r"interlock\.window: got 0\.5"]),
    ],
)
def test_plans_that_do_not_exist(ranks4: RankPool, section, says):
    assert_all_say(ranks4.run(build, job=Job({**INTERLOCK, **section})), *says)


def misuse(folder: str) -> dict[str, Exception | None]:
    """Ways to call ``initialize`` and the engine wrongly."""
    job = Job({**INTERLOCK, "head": {"learning_rate_scale": 2.0}})
    config = job.config()
    plain = make_module(job.but(section=None))
    other_section = make_module(job.but(section={**INTERLOCK, "window": 3}))
    unbound = make_module(Job(INTERLOCK), interlock=None)
    engine = make_engine(Job(INTERLOCK))
    unscaled = Job(INTERLOCK).config()

    def initialize(**arguments: Any) -> Exception | None:
        return caught(ds_interlock.initialize, **arguments)

    def adam(net: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters())

    def train_without_gradients() -> None:
        with torch.no_grad():
            engine.train_batch(full_batch())

    return {
        "plain": initialize(model=plain, config=config),
        "section": initialize(model=other_section, config=config),
        "no config": initialize(model=make_module(job)),
        "two configs": initialize(
            model=make_module(job), config=config, args=SimpleNamespace(deepspeed_config="other.json")
        ),
        "no such file": initialize(model=make_module(job), config="missing.json"),
        "mpu": initialize(model=make_module(job), config=config, mpu=object()),
        "mesh": initialize(model=make_module(job), config=config, mesh_param=(1, 4)),
        "forward": caught(engine.forward, 1),
        "rate": initialize(model=(net := make_module(job)), config=config, optimizer=adam(net)),
        "heads": initialize(model=unbound, config=unscaled, optimizer=adam(unbound)),
        "checkpoint": caught(make_module, job, activation_checkpoint_func=print),
        "no gradients": caught(train_without_gradients),
        "reduce": caught(engine.eval_batch, full_batch(), reduce_output="sum"),
        "tags": caught(engine.save_checkpoint, folder, tag=f"loss {engine.stage_id}"),
    }


@pytest.mark.bad_input
def test_misuse(ranks4: RankPool, tmp_path: Path):
    results = ranks4.run(misuse, folder=str(tmp_path))
    assert not any(tmp_path.iterdir())
    says = {
        "plain": (ConfigError, "needs a ds_interlock.InterlockPipelineModule, got PipelineModule"),
        "section": (ConfigError, "differs from the one that InterlockPipelineModule was built with"),
        "no config": (ConfigError, "no DeepSpeed config"),
        "two configs": (ConfigError, "got two DeepSpeed configs, config= and --deepspeed_config"),
        "no such file": (ConfigError, "missing.json: cannot read"),
        "mpu": (ConfigError, "mpu must be None"),
        "mesh": (ConfigError, "mesh_param is not supported"),
        "forward": (PipelineError, "Only train_batch() is accessible"),
        "rate": (ConfigError, "interlock.head.learning_rate_scale works with the optimizer of the JSON"),
        "heads": (ConfigError, "the optimizer does not train the heads (0.readout.norm.weight"),
        "checkpoint": (ConfigError, "activation_checkpoint_func"),
        "no gradients": (RuntimeError, "use eval_batch"),
        "reduce": (NotImplementedError, "'sum'"),
        "tags": (ConfigError, "the tag 'loss 0' on rank 0 and 'loss 1' on rank 1: expected the same"),
    }
    for name, (kind, text) in says.items():
        for result in results:
            assert isinstance(result[name], kind), (name, result[name])
            assert text in str(result[name])
