"""Profiles of Hugging Face models: the layers are the job's, their costs the whole model's."""

from functools import cache
from typing import Any

import pytest
import torch
from families import NUM_BLOCKS, VOCABULARY, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from ds_interlock.config import HeadConfig
from ds_interlock.hf.model.cut import Blueprint
from ds_interlock.hf.model.pretrained import empty_model
from ds_interlock.hf.model.profile import estimate_profile, measure_profile
from ds_interlock.hf.model.surgery import Skeleton
from ds_interlock.planning.profile import Profile

BATCH, LENGTH, WIDTH = 2, 16, 32
FAMILIES = ["gemma2", "opt, projected", "mixtral", "cohere", "bloom"]
"""One of each kind: capped or scaled logits, scaled or projected embeddings, experts, no rotary."""


@cache
def estimated(family: str, **head: Any) -> Profile:
    return estimate_profile(
        family,
        tiny_config(family),
        HeadConfig(**head),
        micro_batch_size=BATCH,
        seq_length=LENGTH,
        flops_per_second=1.0,
        link=(1e-6, 1e9),
    )


def measured(family: str, **head: Any) -> Profile:
    return measure_profile(
        family,
        tiny_config(family),
        HeadConfig(**head),
        dtype=torch.float32,
        micro_batch_size=BATCH,
        seq_length=LENGTH,
        make_optimizer=torch.optim.SGD,
        num_rounds=1,
        link=None,
    )


def operations_of_the_whole_model(family: str) -> int:
    model = tiny_model(family)
    model.set_attn_implementation("eager")  # torch does not count those of its fused attention on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(BATCH, LENGTH, dtype=torch.int64), use_cache=False)
    return counter.get_total_flops()


def job_layers(family: str) -> list[str]:
    """Names of the layers as launcher/finetune.py has them, a tied unembedding by its place."""
    blueprint = Blueprint(Skeleton(empty_model(tiny_config(family), "causal", torch.float32)), lambda _: {})
    names = [spec.typename.__name__ for spec in blueprint.layers()]
    return [f"{number} {'Unembedding' if name == 'Embedding' else name}" for number, name in enumerate(names)]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_has_the_layers_of_a_job_and_the_operations_of_the_model(family: str) -> None:
    profile = estimated(family)
    assert [layer.name for layer in profile.layers] == job_layers(family)
    assert sum(layer.forward_seconds for layer in profile.layers) == operations_of_the_whole_model(family)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_a_measured_profile_is_of_the_layers_that_an_estimate_is_of(family: str) -> None:
    profile, estimate = measured(family), estimated(family)
    assert profile.head.num_parameters == estimate.head.num_parameters
    assert profile.tied_layers == estimate.tied_layers
    for layer, other in zip(profile.layers, estimate.layers, strict=True):
        assert (layer.name, layer.num_parameters) == (other.name, other.num_parameters)
        assert layer.output_bytes == 2 * other.output_bytes  # float32, and bfloat16 in the estimate
        assert layer.forward_seconds > 0


def test_a_tied_unembedding_costs_what_an_untied_one_does() -> None:
    profile = estimated("gpt2")
    assert profile.tied_layers == (0, len(profile.layers) - 1)
    unembedding = profile.layers[-1]
    product = 2 * BATCH * LENGTH * WIDTH * VOCABULARY
    assert unembedding.forward_seconds == unembedding.input_gradient_seconds == product
    assert unembedding.weight_gradient_seconds == product
    assert unembedding.num_parameters == WIDTH * VOCABULARY
    assert unembedding.optimizer_seconds > 0


@pytest.mark.parametrize("head", [{"blocks": 1, "sequence_fraction": 0.5}, {"type": "lens"}], ids=str)
def test_heads_read_the_hidden_state_also_where_logits_are_capped(head: dict[str, Any]) -> None:
    estimate, profile = estimated("gemma2", **head), measured("gemma2", **head)
    assert estimate.layers[-1].name == f"{NUM_BLOCKS + 3} Logits"
    assert estimate.layers[-1].num_parameters == 0
    sequences = 1 if "blocks" in head else BATCH
    assert estimate.head.seconds >= 2 * (2 * sequences * LENGTH * WIDTH * VOCABULARY)
    if "blocks" in head:
        layer, (with_block,) = estimate.layer_seconds[1], set(estimate.cost_model([0, 2, 5]).head)
        assert with_block == estimate.head.seconds + sequences / BATCH * layer
    assert profile.head.seconds > 0
    assert profile.head.num_parameters == estimate.head.num_parameters
