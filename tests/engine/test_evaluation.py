"""Evaluation and data in the forms that scripts use, in every mode."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from engine_jobs import (
    VOCABULARY,
    Job,
    MicroBatch,
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

MODES: list[dict[str, Any]] = [
    {"mode": "global"},
    {"mode": "local"},
    {"mode": "interlock", "window": 1.5},
    {"mode": "interlock", "window": 2},
]


def micro_batch(size: int, length: int) -> MicroBatch:
    """Two sequences are as good as any: the numbers say which."""
    generator = torch.Generator().manual_seed(1000 * size + length)
    draw = [torch.randint(0, VOCABULARY, (size, length), generator=generator) for _ in range(2)]
    return draw[0], draw[1]


# Outputs without labels.


def outputs_of(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    return [_outputs_of(job) for job in jobs]


def _outputs_of(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    data = data_for(engine, job)
    pairs = [micro_batch(3, length) for length in (4, 9, 6)]
    ask = {"compute_loss": False, "reduce_output": None, "num_micro_batches": 3}
    # DeepSpeed's own engine can do it before training only, and for one shape.
    outputs = {"untrained": engine.eval_batch(iter([(pairs[0][0], None)] * 3), **ask)}
    engine.train_batch(data)
    if job.section is not None:
        outputs["with labels"] = engine.eval_batch(iter(pairs), **ask)
        outputs["without"] = engine.eval_batch(iter([(inputs, None) for inputs, _ in pairs]), **ask)
    engine.train_batch(data)
    if job.section is not None:
        engine.drain()
    return {"outputs": outputs, "after": parameters_of(engine)}


def test_outputs_need_no_labels(ranks4: RankPool):
    jobs = [Job(section, num_batches=2) for section in MODES]
    theirs = Job(None, num_batches=2, module={"dynamic_shape": True})
    by_rank = ranks4.run(outputs_of, jobs=[*jobs, theirs])
    *others, (*ours, deepspeed) = by_rank
    for of_rank in others:
        assert all(set(result["outputs"].values()) == {None} for result in of_rank[:-1])
    for outputs in (result["outputs"] for result in ours):
        assert all(map(torch.equal, outputs["untrained"], deepspeed["outputs"]["untrained"]))
        assert [tuple(output.shape) for output in outputs["without"]] == [
            (3, n, VOCABULARY) for n in (4, 9, 6)
        ]
        assert all(map(torch.equal, outputs["without"], outputs["with labels"]))
    for of_global, *_, of_deepspeed in by_rank:
        assert all(torch.equal(p, of_deepspeed["after"][name]) for name, p in of_global["after"].items())


# Shapes that change within a batch and between batches, with an evaluation of yet another size in between.

TRAINING = [[micro_batch(2, n) for n in lengths] for lengths in ([5, 9, 2, 7], [3, 3, 6, 1], [4, 4, 4, 4])]
EVALUATION = [micro_batch(size, length) for size, length in ((3, 8), (1, 2), (5, 4))]


def train_on_shapes(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    return [_train_on_shapes(job) for job in jobs]


def _train_on_shapes(job: Job) -> dict[str, Any]:
    engine = make_engine(job)
    before, evaluated = parameters_of(engine), []
    for batch in TRAINING:
        engine.train_batch(iter(batch))
        evaluated.append(float(engine.eval_batch(iter(EVALUATION), num_micro_batches=len(EVALUATION))))
    plan = None if job.section is None else engine.plan
    return {"before": before, "evaluated": evaluated, "after": parameters_of(engine), "plan": plan}


def train_in_one_process(job: Job, results: list[dict[str, Any]]) -> tuple[list[float], dict[str, Tensor]]:
    specs, plan = layers(), results[0]["plan"]
    head = head_factory(InterlockConfig.from_deepspeed(job.config()).head, specs)
    net = InProcessPipeline([spec.build() for spec in specs], loss_fn, plan, head)
    net.load_state_dict({name: value for result in results for name, value in result["before"].items()})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    evaluated = []
    for batch in TRAINING:
        optimizer.zero_grad()
        net.accumulate_gradients(batch)
        optimizer.step()
        evaluated.append(float(net.evaluate(EVALUATION)[plan.final]))
    return evaluated, dict(net.named_parameters())


def test_shapes_that_change_and_evaluation_right_after_training(ranks4: RankPool):
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "gradient_clipping": 0.0}
    jobs = [Job(section, extra=sgd) for section in MODES]
    deepspeed = Job(None, extra=sgd, module={"dynamic_shape": True})
    by_rank = ranks4.run(train_on_shapes, jobs=[*jobs, deepspeed])
    *by_job, theirs = zip(*by_rank, strict=True)
    for job, results in zip(jobs, by_job, strict=True):
        evaluated, parameters = train_in_one_process(job, list(results))
        for result in results:
            assert result["evaluated"] == results[0]["evaluated"]
            torch.testing.assert_close(result["evaluated"], evaluated, rtol=1e-5, atol=0.0)
            for name, parameter in result["after"].items():
                torch.testing.assert_close(parameter, parameters[name].detach(), rtol=1e-4, atol=1e-6)
    for ours, reference in zip(by_job[0], theirs, strict=True):
        assert all(torch.equal(p, reference["after"][name]) for name, p in ours["after"].items())
        assert ours["evaluated"] == reference["evaluated"]


# Data on one tensor-parallel rank of each stage only.


def from_the_first_slice(engine: Any) -> Any:
    """A ``batch_fn`` that broadcasts what the first tensor-parallel rank has read, as Megatron does."""
    group = engine.grid.get_slice_parallel_group()
    source = torch.distributed.get_process_group_ranks(group)[0]

    def batch_fn(batch: MicroBatch | None) -> MicroBatch:
        boxed = [batch]
        torch.distributed.broadcast_object_list(boxed, src=source, group=group)
        assert boxed[0] is not None
        return boxed[0]

    return batch_fn


def train_slices(jobs: Sequence[Job], *, everywhere: bool) -> list[dict[str, Any]]:
    return [_train_slices(job, everywhere=everywhere) for job in jobs]


def _train_slices(job: Job, *, everywhere: bool) -> dict[str, Any]:
    from deepspeed.pipe import PipelineModule  # noqa: F401 - DeepSpeed's topologies come with it
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    engine = make_engine(job, topology=topology, num_stages=None)
    has_data = everywhere or engine.grid.get_slice_parallel_rank() == 0

    def data(num: int, seed: int) -> Iterator[MicroBatch] | None:
        return iter(micro_batches(num, seed=seed)) if has_data else None

    if not everywhere:
        engine.set_batch_fn(from_the_first_slice(engine))
    for number in range(2):
        engine.train_batch(data(job.num_micro_batches, seed=number))
    evaluated = float(engine.eval_batch(data(4, seed=9)))
    return {"evaluated": evaluated, "after": parameters_of(engine)}


def test_data_on_one_tensor_parallel_rank_only(ranks4: RankPool):
    sections: list[dict[str, Any] | None] = [None, *MODES[:3]]
    jobs = [Job(section, num_stages=2) for section in sections]
    everywhere = ranks4.run(train_slices, jobs=jobs[1:], everywhere=True)
    one_only = ranks4.run(train_slices, jobs=jobs, everywhere=False)
    for expected, (deepspeed, *results) in zip(everywhere, one_only, strict=True):
        for reference, result in zip(expected, results, strict=True):
            assert result["evaluated"] == reference["evaluated"]
            assert all(torch.equal(p, reference["after"][name]) for name, p in result["after"].items())
        assert all(torch.equal(p, deepspeed["after"][name]) for name, p in results[0]["after"].items())
        assert results[0]["evaluated"] == deepspeed["evaluated"]
