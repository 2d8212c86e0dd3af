"""What a layer costs: the passes that are walked, and the operations that are counted."""

import pytest
import torch
from torch import nn

from ds_interlock.pipe.measure import FlopMeter, LayerCall, Stopwatch, profile_head, profile_layer
from ds_interlock.pipe.measure_link import measure_link

FLOPS = FlopMeter(flops_per_second=1.0)
TOKENS, WIDTH, OUT = 6, 4, 10


def linear() -> LayerCall:
    return LayerCall("linear", nn.Linear(WIDTH, OUT, bias=False), (torch.randn(1, TOKENS, WIDTH),))


def test_operations_of_a_linear_layer_by_hand():
    layer = profile_layer(linear(), FLOPS, None)
    product = 2 * TOKENS * WIDTH * OUT
    assert layer.forward_seconds == product
    assert layer.input_gradient_seconds == product
    assert layer.weight_gradient_seconds == product
    assert layer.num_parameters == WIDTH * OUT
    assert layer.output_bytes == TOKENS * OUT * 4
    assert layer.activation_bytes == TOKENS * WIDTH * 4  # the input, for the weight gradient


def test_a_frozen_layer_has_no_weight_gradient():
    call = linear()
    call.module.requires_grad_(False)
    layer = profile_layer(call, FLOPS, None)
    assert layer.input_gradient_seconds > 0
    assert layer.weight_gradient_seconds == layer.optimizer_seconds == layer.num_parameters == 0
    assert layer.activation_bytes == 0


def test_a_first_layer_relays_nothing():
    call = LayerCall("embedding", nn.Embedding(OUT, WIDTH), (torch.zeros(2, 3, dtype=torch.int64),))
    layer = profile_layer(call, Stopwatch(lambda: None, num_runs=2), torch.optim.SGD)
    assert layer.input_gradient_seconds == 0
    assert layer.weight_gradient_seconds > 0
    assert layer.optimizer_seconds > 0


def test_a_layer_is_left_as_it_was():
    call = linear()
    before = call.module.weight.detach().clone()
    profile_layer(call, Stopwatch(lambda: None, num_runs=2), lambda p: torch.optim.SGD(p, lr=1.0))
    assert torch.equal(call.module.weight, before)
    assert call.module.weight.grad is None
    assert call.inputs[0].grad is None


def test_options_and_tuples_as_transformers_blocks_have_them():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden: torch.Tensor, *, scale: torch.Tensor, cache: None) -> tuple:
            assert cache is None
            return self.linear(hidden) * scale, None

    options = {"scale": torch.ones(WIDTH), "cache": None}
    layer = profile_layer(LayerCall("block", Block(), (torch.randn(1, TOKENS, WIDTH),), options), FLOPS, None)
    assert layer.forward_seconds == 2 * TOKENS * WIDTH * WIDTH


def test_a_head_is_forward_and_both_gradients():
    head = nn.Linear(WIDTH, OUT, bias=False)
    found = profile_head(
        head, lambda hidden: head(hidden).sum(), torch.randn(1, TOKENS, WIDTH), FLOPS, None, "linear"
    )
    assert found.seconds == 3 * 2 * TOKENS * WIDTH * OUT
    assert (found.type, found.num_parameters) == ("linear", WIDTH * OUT)


def test_the_stopwatch_takes_the_median_and_does_not_count_the_first_run():
    runs = []
    waits = []
    watch = Stopwatch(lambda: waits.append(None), num_runs=3)
    assert watch(lambda: runs.append(None)) >= 0
    assert len(runs) == len(waits) == 4


def test_a_link_has_a_latency_and_a_bandwidth():
    latency, bandwidth = measure_link(1 << 20)
    assert 0 < latency < 1
    assert bandwidth > 1e6


@pytest.mark.parametrize("flops", [1.0, 4.0])
def test_an_optimizer_that_does_not_run_costs_what_it_moves(flops):
    layer = profile_layer(linear(), FlopMeter(flops), None)
    # 28 bytes a parameter at a byte for 100 operations.
    assert layer.optimizer_seconds == pytest.approx(28 * WIDTH * OUT * 100 / flops)
