"""What a layer costs: the passes that are walked, and the operations that are counted."""

from typing import Any

import pytest
import torch
from torch import nn

from ds_interlock.config import HeadConfig
from ds_interlock.models.lm import LMConfig, lm_layers, lm_loss
from ds_interlock.planning.profile import HeadProfile
from ds_interlock.profiling.layers import FlopMeter, LayerCall, Stopwatch, profile_head, profile_layers
from ds_interlock.profiling.link import measure_link
from ds_interlock.profiling.model import calls_in_sequence, profile_model

FLOPS = FlopMeter(flops_per_second=1.0)
TOKENS, WIDTH, OUT = 6, 4, 10


def one_layer(call, meter, optimizer):
    (layer,) = profile_layers([call], meter, optimizer)
    return layer


def linear() -> LayerCall:
    return LayerCall("linear", nn.Linear(WIDTH, OUT, bias=False), (torch.randn(1, TOKENS, WIDTH),))


def test_operations_of_a_linear_layer_by_hand():
    layer = one_layer(linear(), FLOPS, None)
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
    layer = one_layer(call, FLOPS, None)
    assert layer.input_gradient_seconds > 0
    assert layer.weight_gradient_seconds == layer.optimizer_seconds == layer.num_parameters == 0
    assert layer.activation_bytes == 0


def test_a_first_layer_relays_nothing():
    call = LayerCall("embedding", nn.Embedding(OUT, WIDTH), (torch.zeros(2, 3, dtype=torch.int64),))
    layer = one_layer(call, Stopwatch(lambda: None, num_rounds=2), torch.optim.SGD)
    assert layer.input_gradient_seconds == 0
    assert layer.weight_gradient_seconds > 0
    assert layer.optimizer_seconds > 0


def test_a_layer_is_left_as_it_was():
    call = linear()
    before = call.module.weight.detach().clone()
    one_layer(call, Stopwatch(lambda: None, num_rounds=2), lambda p: torch.optim.SGD(p, lr=1.0))
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
    layer = one_layer(LayerCall("block", Block(), (torch.randn(1, TOKENS, WIDTH),), options), FLOPS, None)
    assert layer.forward_seconds == 2 * TOKENS * WIDTH * WIDTH


def test_a_head_is_forward_and_both_gradients():
    head = nn.Linear(WIDTH, OUT, bias=False)
    found = profile_head(
        head, lambda hidden: head(hidden).sum(), torch.randn(1, TOKENS, WIDTH), FLOPS, None, "linear"
    )
    assert found.seconds == 3 * 2 * TOKENS * WIDTH * OUT
    assert (found.type, found.num_parameters) == ("linear", WIDTH * OUT)


def test_layers_are_walked_in_the_order_of_training_and_the_first_round_does_not_count():
    seen = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            seen.append(self.name)
            return self.linear(hidden)

    calls = [LayerCall(name, Noted(name), (torch.randn(1, TOKENS, WIDTH),)) for name in "ab"]
    layers = profile_layers(calls, Stopwatch(lambda: None, num_rounds=3), torch.optim.SGD)
    assert "".join(seen) == "ab" * 4
    assert [layer.name for layer in layers] == ["a", "b"]
    for layer in layers:
        passes = layer.forward_seconds, layer.input_gradient_seconds, layer.optimizer_seconds
        assert min(passes) > 0


def test_the_stopwatch_waits_for_the_device_before_and_after():
    events = []
    seconds, result = Stopwatch(lambda: events.append("wait"))(lambda: events.append("work") or 7)
    assert events == ["wait", "work", "wait"]
    assert result == 7
    assert seconds > 0


def test_a_link_has_a_latency_and_a_bandwidth():
    latency, bandwidth = measure_link(1 << 20)
    assert 0 < latency < 1
    assert bandwidth > 1e6


@pytest.mark.parametrize("flops", [1.0, 4.0])
def test_an_optimizer_that_does_not_run_costs_what_it_moves(flops):
    layer = one_layer(linear(), FlopMeter(flops), None)
    # 28 bytes a parameter at a byte for 100 operations.
    assert layer.optimizer_seconds == pytest.approx(28 * WIDTH * OUT * 100 / flops)


def profiled_head(meter: Any, **config: Any) -> HeadProfile:
    specs = lm_layers(LMConfig(vocab_size=OUT, seq_length=TOKENS, width=8, num_blocks=1, num_heads=2))
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    calls = calls_in_sequence((spec.build() for spec in specs), ids)
    make = torch.optim.SGD if isinstance(meter, Stopwatch) else None
    names = {"model": "m", "device": "d", "source": "s"}
    return profile_model(calls, HeadConfig(**config), lm_loss(), ids, meter, make, **names).head


def test_the_default_head_is_that_of_a_model_that_is_not_pretrained():
    assert profiled_head(FLOPS).type == "norm_linear"
    assert profiled_head(FLOPS, objective="kl").type == "lens"
    every = {"cross_entropy": 1, "kl": 1, "reconstruction": 1}
    assert profiled_head(Stopwatch(lambda: None, num_rounds=1), objective=every).seconds > 0


def test_a_shared_readout_computes_no_gradient_of_its_copy():
    unembed = 2 * TOKENS * 8 * OUT
    shared = profiled_head(FLOPS, type="shared")
    assert (shared.seconds, shared.copy_bytes) == (2 * unembed, 4 * 8 * OUT)
    assert shared.num_parameters == 2 * 8 + 1
    assert profiled_head(FLOPS, type="lens").copy_bytes == 0


def test_learning_from_a_base_model_costs_its_outputs_too():
    unembed, translate = 2 * TOKENS * 8 * OUT, 2 * TOKENS * 8 * 8
    alone = profiled_head(FLOPS, type="lens").seconds
    assert alone == 2 * unembed + 3 * translate
    assert profiled_head(FLOPS, objective="kl").seconds == alone + unembed + translate
    both = {"cross_entropy": 1, "kl": 1}
    assert profiled_head(FLOPS, objective=both).seconds == 2 * alone + unembed + translate
    assert profiled_head(FLOPS, objective="reconstruction").seconds == 0
