"""What a stage's update is made of: clipping, tied weights, recomputed activations."""

from typing import Any

import pytest
import torch
from engine_jobs import (
    BF16_ZERO_1,
    FP32_ZERO_1,
    VOCABULARY,
    WIDTH,
    Job,
    Outcome,
    assert_same,
    data_for,
    layers,
    make_engine,
    outcomes,
    parameters_of,
)
from ranks import RankPool, caught
from torch import Tensor, nn

from ds_interlock import ConfigError

INTERLOCK = {"mode": "interlock", "window": 2, "head": {"type": "norm_linear", "blocks": 1, "weight": 0.7}}
LOCAL = {"mode": "local"}


# Clipping.


def start_and_train(job: Job, **module: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    engine = make_engine(job, **module)
    before = parameters_of(engine)
    for _ in range(job.num_batches):
        engine.train_batch(data_for(engine, job))
    engine.drain()
    after = parameters_of(engine)
    engine.destroy()
    return before, after


@pytest.mark.parametrize("extra", [{}, FP32_ZERO_1], ids=["no ZeRO", "ZeRO 1"])
@pytest.mark.parametrize("num_stages", [4, 2])
def test_each_stage_clips_by_the_norm_of_its_own_gradients(ranks4: RankPool, num_stages, extra):
    # Plain SGD with rate 1: a step is the gradient.
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, **extra}
    section = INTERLOCK if num_stages == 4 else LOCAL
    job = Job(section, num_stages=num_stages, num_batches=1, extra={**sgd, "gradient_clipping": 0.0})
    limit = 0.2
    free = ranks4.run(start_and_train, job=job)
    clipped = ranks4.run(start_and_train, job=job.but(extra={**sgd, "gradient_clipping": limit}))
    norms = []
    for (before, after), (_, after_clipped) in zip(free, clipped, strict=True):
        names = list(before)
        parameters = [torch.nn.Parameter(before[name].clone()) for name in names]
        for parameter, name in zip(parameters, names, strict=True):
            parameter.grad = before[name] - after[name]
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        for parameter, name in zip(parameters, names, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(
                after_clipped[name], before[name] - parameter.grad, rtol=1e-5, atol=2e-7
            )
    assert min(norms) > limit, "clipping must be active everywhere"
    assert len({round(norm, 3) for norm in norms}) == num_stages, "stages have norms of their own"


def free_and_clipped_steps(job: Job, limit: float, slices: int = 1) -> list[dict[str, Tensor]]:
    """The steps of this rank, without and with clipping, of plain SGD with rate 1: the gradients."""
    from deepspeed.pipe import PipelineModule  # noqa: F401 - DeepSpeed's topologies come with it
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=job.num_stages, num_mp=slices, num_dp=1)
    steps = []
    for clipping in (0.0, limit):
        extra = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "gradient_clipping": clipping}
        before, after = start_and_train(job.but(extra=extra), topology=topology, num_stages=None)
        steps.append({name: after[name] - before[name] for name in before})
    return steps


def norm_of(steps: list[dict[str, Tensor]]) -> float:
    return float(
        torch.stack([step.square().sum() for of_rank in steps for step in of_rank.values()]).sum().sqrt()
    )


def test_stages_that_keep_ties_clip_by_one_norm(ranks4: RankPool):
    job = Job({**LOCAL, "tied_weights": "sync"}, tied=True, num_batches=1)
    limit = 0.2
    by_rank = ranks4.run(free_and_clipped_steps, job=job, limit=limit)
    del by_rank[-1][0][TIED], by_rank[-1][1][TIED]  # the copies have one gradient
    free, clipped = zip(*by_rank, strict=True)
    assert norm_of(free) > limit
    assert norm_of(clipped) == pytest.approx(limit, rel=1e-4)


def test_what_tensor_parallel_ranks_replicate_counts_once(ranks4: RankPool):
    job = Job(LOCAL, num_stages=2, num_batches=1)
    for _, clipped in ranks4.run(free_and_clipped_steps, job=job, limit=0.2, slices=2):
        assert norm_of([clipped]) == pytest.approx(0.2, rel=1e-4)


# Sparse gradients.


def train_a_sparse_embedding(job: Job) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters with and without ``sparse``."""
    from deepspeed.pipe import LayerSpec

    specs: list[Any] = layers()
    results = []
    for sparse in (False, True):
        specs[0] = LayerSpec(nn.Embedding, VOCABULARY, WIDTH, sparse=sparse)
        engine = make_engine(job, layers=specs)
        engine.train_batch(data_for(engine, job))
        results.append(parameters_of(engine))
        engine.drain()
        engine.destroy()
    return results[0], results[1]


def test_sparse_gradients(ranks4: RankPool):
    extra = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 0.2}
    job = Job(LOCAL, num_batches=1, extra=extra)
    for dense, sparse in ranks4.run(train_a_sparse_embedding, job=job):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


# Tied weights.

TIED = "tied_modules.embedding.weight"


def copies(of_ranks: list[Outcome]) -> list[Tensor]:
    return [outcome.parameters[TIED] for outcome in of_ranks if TIED in outcome.parameters]


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16, ZeRO 1"])
def test_tied_weights_stay_equal_or_go_apart(ranks4: RankPool, extra):
    section = {**INTERLOCK, "head": {"type": "norm_linear"}}
    job = Job(None, tied=True, num_batches=3, extra=extra)
    kept, cut, kept_longer = outcomes(
        ranks4,
        job.but(section={**section, "tied_weights": "sync"}),
        job.but(section={**section, "tied_weights": "untie"}),
        job.but(section={**section, "tied_weights": "sync"}, num_batches=4),
    )
    for run in (kept, cut, kept_longer):
        assert len(copies(run)) == 2
    assert torch.equal(*copies(kept))
    assert torch.equal(*copies(kept_longer))
    assert not torch.equal(copies(kept)[0], copies(kept_longer)[0])
    assert not torch.equal(*copies(cut))
    # Kept ties end streaming: what train_batch returns is exact, on every rank.
    assert [outcome.returned for outcome in kept] == [kept[0].returned] * 4
    assert kept[0].returned[-1] == kept[0].final


def build_tied(tied_weights: str) -> tuple[Exception | None, Tensor | None]:
    job = Job({**INTERLOCK, "head": {"type": "linear"}, "tied_weights": tied_weights}, tied=True)
    error = caught(make_engine, job)
    if error is not None:
        return error, None
    engine = make_engine(job)
    return None, parameters_of(engine).get(TIED)


def test_untied_copies_start_equal(ranks4: RankPool):
    first, second = [copy for _, copy in ranks4.run(build_tied, tied_weights="untie") if copy is not None]
    assert torch.equal(first, second)


@pytest.mark.bad_input
def test_tied_weights_can_be_refused(ranks4: RankPool):
    for error, _ in ranks4.run(build_tied, tied_weights="error"):
        assert isinstance(error, ConfigError)
        assert "'embedding'" in str(error)
        assert "interlock.tied_weights" in str(error)


def shift(embedding: nn.Embedding, hidden_btd: Tensor) -> Tensor:
    """A second use of the embedding, on the same stage."""
    return hidden_btd + embedding.weight.mean(0)


def train_with_a_tie_within_a_stage(job: Job) -> tuple[bool, dict[str, Tensor]]:
    from deepspeed.pipe import TiedLayerSpec

    specs: list[Any] = layers(job.dropout, tied=True)
    specs[-1] = layers()[-1]
    specs[1] = TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH, forward_fn=shift)
    engine = make_engine(job, layers=specs)
    data = data_for(engine, job)
    for _ in range(job.num_batches):
        engine.train_batch(data)
    engine.drain()
    parameters = parameters_of(engine)
    streaming = engine.streaming
    engine.destroy()
    return streaming, parameters


def test_a_tie_within_one_stage_is_no_reason_to_wait(ranks4: RankPool):
    section = {**INTERLOCK, "tied_weights": "error", "head": {"type": "linear"}}
    job = Job(section, num_batches=3, dropout=0.2)
    streaming = ranks4.run(train_with_a_tie_within_a_stage, job=job)
    waiting = ranks4.run(
        train_with_a_tie_within_a_stage, job=job.but(section={**section, "streaming": False})
    )
    assert [flag for flag, _ in streaming] == [True] * 4
    assert [flag for flag, _ in waiting] == [False] * 4
    for (_, one), (_, other) in zip(streaming, waiting, strict=True):
        assert all(torch.equal(parameter, other[name]) for name, parameter in one.items())


# Activation checkpointing with several passes through a stage.


def test_activation_checkpointing_changes_nothing(ranks4: RankPool):
    job = Job({**INTERLOCK, "window": 3}, dropout=0.2, num_batches=3)
    kept, recomputed = outcomes(ranks4, job, job.but(module={"activation_checkpoint_interval": 2}))
    assert_same(kept, recomputed)
