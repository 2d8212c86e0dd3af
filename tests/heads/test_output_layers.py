"""What is found at the end of a model, and what is made of it."""

from operator import itemgetter
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from head_models import (
    VOCABULARY,
    WIDTH,
    Block,
    Embeddings,
    ModelRMSNorm,
    NormAndUnembedding,
    build,
    hidden_and_labels,
    language_model,
    unembed,
)
from torch import nn

from ds_interlock.config import HeadConfig
from ds_interlock.errors import ConfigError
from ds_interlock.heads.factory import head_factory
from ds_interlock.heads.output_layers import find_output_layers
from ds_interlock.schedule.plan import LossHead


def test_a_norm_and_an_unembedding_in_layers_of_their_own() -> None:
    end = find_output_layers(language_model(bias=True))
    assert (end.width, end.num_outputs, end.bias, end.init_std, end.tail) == (
        WIDTH,
        VOCABULARY,
        True,
        None,
        (),
    )
    norm = end.make_norm()
    assert isinstance(norm, nn.LayerNorm)
    assert (norm.normalized_shape, norm.eps) == ((WIDTH,), 1e-4)
    assert not norm.weight.is_meta


@pytest.mark.parametrize("bias", [False, True])
def test_both_in_one_layer(bias: bool) -> None:
    end = find_output_layers([LayerSpec(Block), LayerSpec(NormAndUnembedding, bias)])
    norm = end.make_norm()
    assert isinstance(norm, nn.RMSNorm)
    assert (norm.eps, end.bias, end.init_std) == (1e-2, bias, 0.02)


class Returning(nn.Linear):
    """Takes a hidden state in one of several forms, and returns outputs in another."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(WIDTH, VOCABULARY)
        self.num_inputs, self.num_outputs = num_inputs, num_outputs

    def forward(self, inputs: Any) -> Any:
        if self.num_inputs:
            hidden, *others = inputs
            assert len(others) == self.num_inputs - 1
        else:
            hidden, others = inputs.flatten(1), [None]
        outputs = (super().forward(hidden), *others)
        return outputs[: self.num_outputs] if self.num_outputs else outputs[0]


@pytest.mark.parametrize("as_spec", [True, False], ids=["spec", "module"])
@pytest.mark.parametrize("num_inputs", [0, 1, 3])
def test_a_head_returns_outputs_in_a_tuple_if_the_model_does(num_inputs: int, as_spec: bool) -> None:
    last = [LayerSpec(Returning, num_inputs, n) if as_spec else Returning(num_inputs, n) for n in range(3)]
    assert not find_output_layers([nn.LayerNorm(WIDTH), last[0]]).in_tuple
    assert find_output_layers([nn.LayerNorm(WIDTH), last[1]]).in_tuple
    if num_inputs != 1:
        with pytest.raises(ConfigError, match="Returning, which unembeds, returns a tuple of 2"):
            find_output_layers([last[2]])
    head = head_factory(HeadConfig(), [last[1], itemgetter(0), nn.Softmax(-1)])(LossHead(0, 1))
    outputs = head(torch.randn(1, 4, WIDTH))
    assert outputs.shape == (1, 4, VOCABULARY)
    torch.testing.assert_close(outputs.sum(-1), torch.ones(1, 4))
    (outputs,) = head_factory(HeadConfig(), [last[1]])(LossHead(0, 1))(torch.randn(1, 4, WIDTH))
    assert outputs.shape == (1, 4, VOCABULARY)


def test_a_norm_of_the_models_own_class_starts_as_that_class_does() -> None:
    norm = find_output_layers([ModelRMSNorm(WIDTH, eps=1e-3), nn.Linear(WIDTH, 3)]).make_norm()
    assert isinstance(norm, ModelRMSNorm)
    assert norm.variance_epsilon == 1e-3
    assert not norm.weight.any()


def test_a_norm_without_weights_stays_without() -> None:
    layers = [LayerSpec(nn.LayerNorm, WIDTH, elementwise_affine=False), LayerSpec(nn.Linear, WIDTH, 3)]
    assert not list(find_output_layers(layers).make_norm().parameters())


def test_the_nearest_norm_that_is_as_wide() -> None:
    layers = [Block(eps=1e-2), Block(eps=1e-3), nn.LayerNorm(2 * WIDTH), nn.Linear(WIDTH, 3)]
    assert find_output_layers(layers).make_norm().eps == 1e-3


def test_a_model_without_norm_has_heads_without() -> None:
    layers = [LayerSpec(nn.Linear, 4, 4), torch.tanh, LayerSpec(nn.Linear, 4, 3)]
    assert find_output_layers(layers).make_norm is None
    assert [name for name, _ in build(layers, after_layer=1).named_parameters()] == [
        "readout.unembedding.weight",
        "readout.unembedding.bias",
    ]


def test_a_tied_embedding_used_in_reverse() -> None:
    layers = [
        TiedLayerSpec("embed", Embeddings, VOCABULARY, WIDTH, tied_weight_attr="tokens.weight"),
        LayerSpec(Block, eps=1e-2),
        TiedLayerSpec(
            "embed", Embeddings, VOCABULARY, WIDTH, forward_fn=unembed, tied_weight_attr="tokens.weight"
        ),
    ]
    end = find_output_layers(layers)
    assert (end.width, end.num_outputs, end.bias, end.init_std) == (WIDTH, VOCABULARY, False, 0.02)
    assert end.make_norm().eps == 1e-2


def test_the_unembedding_starts_as_the_models_own() -> None:
    module = nn.Linear(WIDTH, 4000)
    nn.init.normal_(module.weight, std=0.3)
    given = build([Block(), module]).readout.unembedding.weight
    assert given.std().item() == pytest.approx(0.3, rel=0.02)
    default = build([Block(), LayerSpec(nn.Linear, WIDTH, 4000)]).readout.unembedding.weight
    assert default.std().item() == pytest.approx((3 * WIDTH) ** -0.5, rel=0.02)


@pytest.mark.parametrize("grouped", [False, True], ids=["layers", "sequential"])
def test_what_follows_the_unembedding_is_kept(grouped: bool) -> None:
    parts = [nn.Linear(WIDTH, VOCABULARY), nn.LogSoftmax(-1)]
    layers = [Block(), *([nn.Sequential(*parts)] if grouped else parts), lambda outputs: 2 * outputs]
    outputs_btv = build(layers, after_layer=1)(hidden_and_labels()[0])
    torch.testing.assert_close((outputs_btv / 2).exp().sum(-1), torch.ones(3, 7))


def test_looking_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    head_factory(HeadConfig(), language_model())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "layers",
    [
        [torch.tanh],
        [LayerSpec(nn.Linear, 4, 4), LayerSpec(nn.LayerNorm, 4)],
        [LayerSpec(nn.Embedding, 4, 4)],
    ],
    ids=["no weights", "ends in a norm", "ends in an embedding"],
)
def test_a_model_without_unembedding_needs_heads_of_its_own(layers: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"InterlockPipelineModule.*head=make_head"):
        head_factory(HeadConfig(), layers)
