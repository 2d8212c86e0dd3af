"""The language model: what its layers compute, and what their weights start from."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.pipe import TiedLayerSpec
from torch import Tensor, nn

from ds_interlock.errors import ConfigError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.models.lm import LMConfig, LMLoss, build_lm, lm_layers, lm_loss

SMALL = LMConfig(vocab_size=37, seq_length=12, width=24, num_blocks=3, num_heads=4, seed=5)


def tied(config: LMConfig) -> LMConfig:
    return LMConfig(**{**vars(config), "tie_embeddings": True})


def random_ids(config: LMConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(3))


def test_layers_map_a_tensor_to_a_tensor_and_end_in_norm_and_linear():
    layers = [spec.build() for spec in lm_layers(SMALL)]
    assert len(layers) == SMALL.num_layers == 7
    assert isinstance(layers[-2], nn.LayerNorm)
    assert isinstance(layers[-1], nn.Linear)
    assert layers[-1].bias is None
    hidden = random_ids(SMALL, 2, 9)
    for layer in layers[:-1]:
        hidden = layer(hidden)
        assert hidden.shape == (2, 9, 24)
    assert layers[-1](hidden).shape == (2, 9, 37)


def test_no_position_sees_a_later_one():
    model = build_lm(SMALL).double().eval()
    ids = random_ids(SMALL, 1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % SMALL.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-6


def test_weights_do_not_depend_on_what_was_built_before():
    torch.manual_seed(1)
    whole = build_lm(SMALL)
    torch.manual_seed(2)
    alone = lm_layers(SMALL)[3].build()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(parameter, whole[3].get_parameter(name), rtol=0, atol=0)


def test_layers_can_be_built_without_memory():
    with torch.device("meta"):
        layers = [spec.build() for spec in lm_layers(SMALL)]
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


def test_no_two_layers_and_no_two_seeds_start_alike():
    model, other = build_lm(SMALL), build_lm(LMConfig(**{**vars(SMALL), "seed": 6}))
    weights = [block.attention.qkv.weight for block in (*model[2:5], *other[2:5])]
    for number, weight in enumerate(weights):
        assert all(not torch.equal(weight, later) for later in weights[number + 1 :])


def test_initialisation_is_gpt2s():
    config = LMConfig(vocab_size=500, seq_length=64, width=96, num_blocks=8, num_heads=3)
    block = build_lm(config)[4]
    assert block.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
    assert block.attention.out.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
    assert block.attention.qkv.bias.abs().max() == 0
    assert torch.equal(block.norm_1.weight, torch.ones(96))


def test_tied_layers_share_one_key_and_one_weight():
    specs = lm_layers(tied(SMALL))
    assert isinstance(specs[0], TiedLayerSpec)
    assert specs[0].key == specs[-1].key
    embedding, hidden = specs[0].build(), torch.randn(2, 5, 24)
    expected = hidden @ embedding.weight.T
    torch.testing.assert_close(specs[-1].forward_fn(embedding, hidden), expected)
    model = build_lm(tied(SMALL))
    assert model[-1].weight is model[0].weight


def test_dropout_acts_in_training_only():
    model = build_lm(LMConfig(**{**vars(SMALL), "dropout": 0.3}))
    ids = random_ids(SMALL, 2, 12)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    torch.testing.assert_close(model(ids), build_lm(SMALL)(ids))


def test_loss_is_the_mean_over_labels_that_count():
    logits = torch.randn(2, 6, 11, dtype=torch.float64)
    labels = torch.randint(11, (2, 6))
    labels[0, 4:] = IGNORED_LABEL
    counted = labels != IGNORED_LABEL
    expected = -F.log_softmax(logits, -1)[counted].gather(-1, labels[counted][:, None]).mean()
    torch.testing.assert_close(lm_loss()(logits, labels), expected)


def fused(loss: LMLoss) -> Callable[..., Tensor]:
    """The loss of logits, computed as that of hidden states under an identity."""
    return lambda logits, labels: loss.fused_linear(
        logits, torch.eye(logits.shape[-1]).double(), None, labels
    )


@pytest.mark.parametrize("way", [LMLoss.__call__, lambda loss, *args: fused(loss)(*args)], ids=["", "fused"])
def test_a_normaliser_takes_the_place_of_the_number_of_labels(way: Callable[..., Tensor]):
    logits, labels = torch.randn(2, 6, 11, dtype=torch.float64), torch.randint(11, (2, 6))
    labels[0, 4:] = IGNORED_LABEL
    base = torch.randn(2, 6, 24)
    mean = way(lm_loss(), logits, labels)
    for form in ((labels, torch.tensor([4.0])), (labels, torch.tensor([4.0]), base)):
        found = way(lm_loss(), logits, form)
        assert found.shape == ()
        torch.testing.assert_close(found, mean * 10 / 4)


def test_the_mean_over_micro_batches_is_that_over_the_labels_of_the_batch():
    logits, labels = torch.randn(4, 6, 11), torch.randint(11, (4, 6))
    labels[1:, 2:] = IGNORED_LABEL
    labels[3] = IGNORED_LABEL
    whole = lm_loss()(logits, labels)
    for sizes in ([1, 1, 1, 1], [1, 3], [2, 2]):
        normaliser = (labels != IGNORED_LABEL).sum().float().reshape(1) / len(sizes)
        pieces = zip(logits.split(sizes), labels.split(sizes), strict=True)
        parts = [lm_loss()(some, (of_some, normaliser)) for some, of_some in pieces]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_whole_sequences_can_be_classified():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, IGNORED_LABEL, 1, 1])
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(lm_loss()(logits, labels), expected)
    torch.testing.assert_close(lm_loss()(logits, (labels, torch.tensor([8.0]))), expected * 4 / 8)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("labels", "got"),
    [
        ((torch.zeros(2, 3), torch.ones(2)), r"\[\[2, 3\], \[2\]\]"),
        ((torch.zeros(2, 3), 4.0), r"\[\[2, 3\], 'float'\]"),
        ((), r"\[\]"),
        (None, r"\['NoneType'\]"),
    ],
)
def test_labels_in_another_form_are_refused(labels: Any, got: str):
    with pytest.raises(ConfigError, match=rf"\(labels, normaliser\).*got {got}$"):
        lm_loss()(torch.zeros(2, 3, 11), labels)


def test_loss_without_labels_is_zero_and_has_a_gradient():
    logits = torch.randn(1, 4, 7, requires_grad=True)
    loss = lm_loss(0.2)(logits, torch.full((1, 4), IGNORED_LABEL))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_labels_are_smoothed_in_training_only():
    logits, labels = torch.randn(2, 3, 9), torch.randint(9, (2, 3))
    loss = lm_loss(0.25)
    sharp = -F.log_softmax(logits, -1).gather(-1, labels[..., None]).mean()
    even = -F.log_softmax(logits, -1).mean()
    torch.testing.assert_close(loss(logits, labels), 0.75 * sharp + 0.25 * even)
    torch.testing.assert_close(loss.eval()(logits, labels), sharp)


def test_loss_of_half_precision_is_computed_in_float32():
    logits = torch.randn(1, 5, 9)
    labels = torch.randint(9, (1, 5))
    half = lm_loss()(logits.bfloat16(), labels)
    assert half.dtype is torch.float32
    torch.testing.assert_close(half, lm_loss()(logits.bfloat16().float(), labels), rtol=0, atol=0)


@pytest.mark.bad_input
def test_impossible_configurations_name_every_fault():
    with pytest.raises(ConfigError, match="3 faults") as error:
        LMConfig(vocab_size=10, seq_length=0, width=10, num_blocks=2, num_heads=4, dropout=1.0)
    for name in ("seq_length is 0", "width is 10", "dropout is 1.0"):
        assert name in str(error.value)
