"""What the benchmarks measure with: sleeps, counted bytes, tables."""

import time

import pytest
import torch
from torch import nn

from benchmarks.activation_memory import LiveBytes
from measuring.results import markdown
from measuring.sleeping import SleepingLayer, sleep, use_exact_timers
from measuring.torch_pipeline import TORCH_SCHEDULES


def test_sleeps_are_never_short_by_more_than_the_last_was_long() -> None:
    use_exact_timers()
    start = time.perf_counter()
    for _ in range(20):
        sleep(0.003)
    assert time.perf_counter() - start > 20 * 0.003 - 0.0005


def test_a_layer_sleeps_for_what_is_asked_of_it() -> None:
    layer = SleepingLayer(4, 0.002, input_gradient_seconds=0.02, weight_gradient_seconds=0.04)
    x = torch.ones(1, 4, requires_grad=True)

    def seconds_of(*inputs: torch.Tensor) -> float:
        start = time.perf_counter()
        torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
        return time.perf_counter() - start

    y = layer(x)
    assert 0.018 < seconds_of(x) < seconds_of(layer.weight) - 0.02  # a weight gradient needs both


def test_live_bytes_counts_a_storage_once_and_until_it_is_let_go_of() -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    live = LiveBytes(iter([weight]))
    x = torch.ones(2, 8)
    with live.counting():
        y = x @ weight  # keeps x, 64 bytes, and the parameter, which does not count
        z = (x[:, :4] * weight[0, :4]).sum()  # keeps a view of x: nothing new
    assert live.peak == 64
    with live.counting():
        more = (y.exp() * 2).sum()  # keeps the result of exp, another 64
    assert live.peak == 128
    del y, z, more
    with live.counting():
        again = torch.ones(2, 8).requires_grad_().exp()
    assert live.peak == 128
    assert again.requires_grad


def test_markdown() -> None:
    text = markdown(["what", "how much"], [("a", 1.23456), ("b", 12345.6), ("c", None), ("d", 7)])
    assert text.splitlines()[2:] == ["| a | 1.23 |", "| b | 12,346 |", "| c |  |", "| d | 7 |"]


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("torch 1F1B", [[0], [1]]),
        ("torch interleaved 1F1B", [[0, 2], [1, 3]]),
        ("torch ZBV", [[0, 3], [1, 2]]),
    ],
)
def test_where_torch_puts_its_stages(name: str, stages: list[list[int]]) -> None:
    assert [TORCH_SCHEDULES[name][1](rank, 2) for rank in range(2)] == stages
