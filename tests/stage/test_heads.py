"""Heads are drawn from seeds of their own, and leave everything else as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ds_interlock.schedule.plan import LossHead
from ds_interlock.stage.heads import build_head

PLACE = LossHead(0, 1)


def linear(head: LossHead) -> nn.Linear:
    return nn.Linear(3, 3)


def test_a_head_depends_on_its_seed_and_number_only():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = build_head(linear, 2, PLACE, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    other = build_head(linear, 1, PLACE, seed=8)
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(linear(PLACE).weight, one.weight)
    torch.manual_seed(7 + 2)
    assert torch.equal(linear(PLACE).weight, one.weight), "the same as ever for a seed"


@pytest.mark.parametrize("uses_gpu", [True, False])
def test_of_several_gpus_only_the_one_of_this_process_is_forked_and_seeded(monkeypatch, uses_gpu):
    forked: list[Sequence[int]] = []
    seeded: list[int] = []

    @contextmanager
    def fork_rng(devices: Sequence[int]) -> Iterator[None]:
        forked.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: uses_gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds every GPU"))
    build_head(linear, 2, PLACE, seed=7)
    assert forked == ([[3]] if uses_gpu else [[]])
    assert seeded == ([9] if uses_gpu else [])
