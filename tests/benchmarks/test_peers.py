"""The peers do the same work: every engine takes the same step on the same model."""

from dataclasses import replace
from itertools import repeat
from typing import Any

import pytest
import torch

from benchmarks.peers import DEEPSPEED, make_peer
from benchmarks.real_stages import workload
from ds_interlock.errors import ConfigError
from ds_interlock.models.lm import LMConfig, build_lm
from ds_interlock.transport.local_ranks import RankError
from measuring.engines import LEARNING_RATE, run_ranks
from measuring.torch_pipeline import TORCH_SCHEDULES

LM = LMConfig(width=64, num_blocks=5, vocab_size=768, seq_length=16, num_heads=1)
NUM_BATCHES = 2


def trained(name: str) -> dict[str, torch.Tensor]:
    """On a rank: its parameters after some batches of 2 micro-batches, by their name in the whole model."""
    work = workload(LM)
    engine = make_peer(name, work)
    engine.set_train_batch_size(2)
    for _ in range(NUM_BATCHES):
        engine.train_batch(repeat(work.micro_batch))
    if name == DEEPSPEED:
        return {name: value.detach() for name, value in engine.module.named_parameters()}
    bounds = work.bounds(engine.num_stages)
    return {
        f"{bounds[stage] + layer}.{parameter_name}": value.detach()
        for stage, part in engine.parts.items()
        for layer, module in enumerate(part)
        for parameter_name, value in module.named_parameters()
    }


@pytest.mark.parametrize("name", [DEEPSPEED, *TORCH_SCHEDULES])
def test_an_engine_trains_as_one_process_does(name: str) -> None:
    trained_values: dict[str, Any] = {}
    for of_rank in run_ranks(trained, 2, name=name):
        trained_values |= of_rank
    work = workload(LM)
    net = build_lm(LM)
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)
    for _ in range(NUM_BATCHES):
        work.loss_fn(net(work.micro_batch[0]), work.micro_batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trained_values.keys() == start.keys()
    for parameter, value in net.named_parameters():
        steps = (trained_values[parameter] - start[parameter], value.detach() - start[parameter])
        torch.testing.assert_close(*steps)


def build_unbalanced() -> None:
    make_peer("global", workload(replace(LM, vocab_size=4096)))


def test_a_model_that_is_cut_unevenly_is_refused() -> None:
    with pytest.raises(RankError, match=rf"{ConfigError.__name__}: stages that take the same time"):
        run_ranks(build_unbalanced, 2)
