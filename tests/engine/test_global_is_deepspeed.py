"""Mode global gives the numbers of DeepSpeed's own pipeline engine, bit for bit."""

import pytest
from engine_jobs import (
    BF16,
    BF16_ZERO_1,
    BF16_ZERO_1_FP32_SUMS,
    FP32_ZERO_1,
    WARMUP,
    Job,
    assert_same,
    is_same,
    outcomes,
)
from ranks import RankPool

PRECISIONS = {
    "fp32": {},
    "bf16": BF16,
    "bf16, ZeRO 1": BF16_ZERO_1,
    "fp32, ZeRO 1": FP32_ZERO_1,
    "bf16, ZeRO 1, sums in fp32": BF16_ZERO_1_FP32_SUMS,
}


def compare_with_deepspeed(pool: RankPool, job: Job) -> None:
    theirs, ours = outcomes(pool, job.but(section=None), job.but(section={"mode": "global"}))
    assert_same(theirs, ours)
    assert [outcome.returned for outcome in theirs] == [outcome.returned for outcome in ours]
    assert len(set(theirs[0].returned)) == job.num_batches, "the losses must move"


@pytest.mark.parametrize("extra", PRECISIONS.values(), ids=PRECISIONS)
def test_four_stages(ranks4: RankPool, extra):
    compare_with_deepspeed(ranks4, Job(None, extra=extra | WARMUP))


@pytest.mark.parametrize("extra", PRECISIONS.values(), ids=PRECISIONS)
def test_two_stages_of_two_replicas(ranks4: RankPool, extra):
    compare_with_deepspeed(ranks4, Job(None, num_stages=2, num_micro_batches=3, extra=extra))


def test_activation_checkpointing(ranks4: RankPool):
    # DeepSpeed's own engine cannot checkpoint a layer whose input has no gradient: not the embedding.
    module = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
    compare_with_deepspeed(ranks4, Job(None, module=module))


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16, ZeRO 1"])
def test_tied_weights(ranks4: RankPool, extra):
    compare_with_deepspeed(ranks4, Job(None, tied=True, extra=extra))


@pytest.mark.parametrize("num_micro_batches", [1, 7])
def test_fewer_and_many_more_micro_batches_than_stages(ranks4: RankPool, num_micro_batches):
    compare_with_deepspeed(ranks4, Job(None, num_micro_batches=num_micro_batches, num_batches=3))


def test_the_comparison_sees_that_clipping_is_active(ranks4: RankPool):
    clipped, free = outcomes(
        ranks4,
        Job({"mode": "global"}, num_batches=2),
        Job({"mode": "global"}, num_batches=2, extra={"gradient_clipping": 0.0}),
    )
    assert not is_same(clipped, free)
