"""Auxiliary heads: what they find at the end of a model, what they compute, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from ds_interlock.config import HeadConfig
from ds_interlock.errors import ConfigError
from ds_interlock.pipe.heads import AuxiliaryHead, find_model_end, head_factory
from ds_interlock.schedule.plan import LossHead

WIDTH, VOCABULARY = 12, 31


class Block(nn.Module):
    """A residual block; carries a mask along if it is given one."""

    def __init__(self, width: int = WIDTH, eps: float = 1e-3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.grow = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)

    def forward(self, hidden: Any) -> Any:
        hidden_btd = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden_btd = hidden_btd + self.shrink(F.gelu(self.grow(self.norm(hidden_btd))))
        return (hidden_btd, *hidden[1:]) if isinstance(hidden, tuple) else hidden_btd


class ModelRMSNorm(nn.Module):
    """A model's own norm, with a scale that starts at 0 and is added to 1."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return F.rms_norm(hidden_btd, (hidden_btd.shape[-1],), 1 + self.weight, self.variance_epsilon)


class NormAndUnembedding(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-2)
        self.unembedding = nn.Linear(WIDTH, VOCABULARY, bias=bias)


class Embeddings(nn.Module):
    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(5, width)
        self.tokens = nn.Embedding(num_tokens, width)


def unembed(module: Embeddings, hidden_btd: Tensor) -> Tensor:
    return hidden_btd @ module.tokens.weight.T


def language_model(*, bias: bool = False) -> list[Any]:
    return [
        LayerSpec(nn.Embedding, VOCABULARY, WIDTH),
        LayerSpec(Block),
        LayerSpec(Block),
        LayerSpec(nn.LayerNorm, WIDTH, eps=1e-4),
        LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=bias),
    ]


def cross_entropy(logits_btv: Tensor, labels_bt: Tensor) -> Tensor:
    return F.cross_entropy(logits_btv.flatten(0, -2), labels_bt.flatten(), ignore_index=-100)


def build(layers: list[Any], after_layer: int = 2, **config: Any) -> nn.Module:
    torch.manual_seed(5)
    return head_factory(HeadConfig(**config), layers)(LossHead(stage=0, after_layer=after_layer))


def hidden_and_labels(num_ignored: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden_btd = torch.randn(3, 7, WIDTH, generator=generator)
    labels_bt = torch.randint(VOCABULARY, (3, 7), generator=generator)
    labels_bt.view(-1)[:num_ignored] = -100
    return hidden_btd, labels_bt


# What is found at the end of a model.


def test_a_norm_and_an_unembedding_in_layers_of_their_own() -> None:
    end = find_model_end(language_model(bias=True))
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
    end = find_model_end([LayerSpec(Block), LayerSpec(NormAndUnembedding, bias)])
    norm = end.make_norm()
    assert isinstance(norm, nn.RMSNorm)
    assert (norm.eps, end.bias, end.init_std) == (1e-2, bias, 0.02)


def test_a_norm_of_the_models_own_class_starts_as_that_class_does() -> None:
    norm = find_model_end([ModelRMSNorm(WIDTH, eps=1e-3), nn.Linear(WIDTH, 3)]).make_norm()
    assert isinstance(norm, ModelRMSNorm)
    assert norm.variance_epsilon == 1e-3
    assert not norm.weight.any()


def test_a_norm_without_weights_stays_without() -> None:
    layers = [LayerSpec(nn.LayerNorm, WIDTH, elementwise_affine=False), LayerSpec(nn.Linear, WIDTH, 3)]
    assert not list(find_model_end(layers).make_norm().parameters())


def test_the_nearest_norm_that_is_as_wide() -> None:
    layers = [Block(eps=1e-2), Block(eps=1e-3), nn.LayerNorm(2 * WIDTH), nn.Linear(WIDTH, 3)]
    assert find_model_end(layers).make_norm().eps == 1e-3


def test_a_model_without_norm_has_heads_without() -> None:
    layers = [LayerSpec(nn.Linear, 4, 4), torch.tanh, LayerSpec(nn.Linear, 4, 3)]
    assert find_model_end(layers).make_norm is None
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
    end = find_model_end(layers)
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


# What the heads compute.


def parameter_shapes(head: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}


def test_linear() -> None:
    head = build(language_model(), type="linear")
    assert parameter_shapes(head) == {"readout.unembedding.weight": (VOCABULARY, WIDTH)}
    hidden_btd, _ = hidden_and_labels()
    torch.testing.assert_close(head(hidden_btd), hidden_btd @ head.readout.unembedding.weight.T)


def test_norm_linear() -> None:
    head = build(language_model(), type="norm_linear")
    hidden_btd, _ = hidden_and_labels()
    normed_btd = F.layer_norm(hidden_btd, (WIDTH,), eps=1e-4)
    torch.testing.assert_close(head(hidden_btd), normed_btd @ head.readout.unembedding.weight.T)


def test_low_rank() -> None:
    head = build(language_model(bias=True), type="low_rank", rank=5)
    assert parameter_shapes(head) == {
        "readout.norm.weight": (WIDTH,),
        "readout.norm.bias": (WIDTH,),
        "readout.down.weight": (5, WIDTH),
        "readout.unembedding.weight": (VOCABULARY, 5),
        "readout.unembedding.bias": (VOCABULARY,),
    }
    assert torch.linalg.matrix_rank(head(hidden_and_labels()[0]).flatten(0, 1)) <= 5 + 1  # 1: the bias


@pytest.mark.parametrize("built", [False, True], ids=["spec", "module"])
def test_block_linear_repeats_the_layer_in_front(built: bool) -> None:
    layers = language_model()
    layers[1] = Block(eps=0.5) if built else LayerSpec(Block, eps=0.5)
    head = build(layers, type="block_linear")
    assert isinstance(head.block, Block)
    assert head.block.norm.eps == 0.5
    hidden_btd, _ = hidden_and_labels()
    torch.testing.assert_close(head(hidden_btd), head.readout(head.block(hidden_btd)))
    if built:
        assert not torch.equal(head.block.grow.weight, layers[1].grow.weight)


@pytest.mark.parametrize("type", ["linear", "norm_linear", "low_rank", "block_linear"])
def test_of_a_tuple_the_first_is_the_hidden_state(type: str) -> None:
    head = build(language_model(), type=type)
    hidden_btd, _ = hidden_and_labels()
    mask = torch.ones(3, 7)
    torch.testing.assert_close(head((hidden_btd, mask)), head(hidden_btd))


# token_fraction.


@pytest.mark.parametrize("training", [False, True])
def test_all_positions_give_exactly_the_models_loss(training: bool) -> None:
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=4)
    head = build(language_model()).train(training)
    assert torch.equal(
        head.loss(hidden_btd, labels_bt, cross_entropy), cross_entropy(head(hidden_btd), labels_bt)
    )


def test_evaluation_uses_all_positions() -> None:
    hidden_btd, labels_bt = hidden_and_labels()
    head = build(language_model(), token_fraction=0.25).eval()
    assert torch.equal(
        head.loss(hidden_btd, labels_bt, cross_entropy), cross_entropy(head(hidden_btd), labels_bt)
    )


def recorded(calls: list[tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append((logits, labels))
        return cross_entropy(logits, labels)

    return loss_fn


@pytest.mark.parametrize(("fraction", "num_chosen"), [(0.5, 8), (0.01, 1), (0.95, 16)])
def test_a_share_of_the_labelled_positions_is_chosen_without_repeats(
    fraction: float, num_chosen: int
) -> None:
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=4)  # leaves 17
    labels_bt[labels_bt != -100] = torch.arange(17)
    head = build(language_model(), token_fraction=fraction).train()
    calls: list[tuple[Tensor, Tensor]] = []
    head.loss(hidden_btd, labels_bt, recorded(calls))
    logits_1nv, labels_1n = calls[0]
    assert labels_1n.shape == (1, num_chosen)
    assert len(set(labels_1n.flatten().tolist())) == num_chosen
    assert -100 not in labels_1n
    # The label says which position it was: the outputs must be that position's.
    all_nv = head(hidden_btd)[labels_bt != -100]
    torch.testing.assert_close(logits_1nv[0], all_nv[labels_1n[0]])


def test_a_block_sees_all_positions() -> None:
    hidden_btd, labels_bt = hidden_and_labels()
    head = build(language_model(), type="block_linear", token_fraction=0.3).train()
    seen = []
    head.block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    head.loss(hidden_btd, labels_bt, cross_entropy)
    assert seen == [(3, 7, WIDTH)]


def test_the_estimate_is_unbiased() -> None:
    # A seeded check of a mean of 4,000 estimates against four times its own standard error.
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=4)
    head = build(language_model(), token_fraction=0.3).train()
    with torch.no_grad():
        exact = cross_entropy(head(3 * hidden_btd), labels_bt)
        torch.manual_seed(1)
        losses = torch.stack([head.loss(3 * hidden_btd, labels_bt, cross_entropy) for _ in range(4000)])
    error = losses.std() / len(losses) ** 0.5
    assert 0 < error < 0.005 * exact, "the check must be able to tell"
    assert abs(losses.mean() - exact) < 4 * error


def test_the_choice_comes_from_the_global_generator() -> None:
    hidden_btd, labels_bt = hidden_and_labels()
    head = build(language_model(), token_fraction=0.3).train()
    state = torch.get_rng_state()
    first = head.loss(hidden_btd, labels_bt, cross_entropy)
    assert not torch.equal(head.loss(hidden_btd, labels_bt, cross_entropy), first)
    torch.set_rng_state(state)
    assert torch.equal(head.loss(hidden_btd, labels_bt, cross_entropy), first)


def test_no_label_at_all_is_left_to_the_loss_function() -> None:
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=21)
    head = build(language_model(), token_fraction=0.3).train()
    loss = head.loss(hidden_btd, labels_bt, lambda logits, labels: logits.sum() + labels.numel())
    assert loss == 0


@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.long), torch.zeros(3, 7, 1), (1, 2)])
def test_sampling_needs_a_label_for_each_position(labels: Any) -> None:
    head = build(language_model(), token_fraction=0.3).train()
    with pytest.raises(ConfigError, match=r"interlock\.head\.token_fraction: 0\.3 needs one label"):
        head.loss(hidden_and_labels()[0], labels, cross_entropy)


# What is refused.


def test_block_linear_behind_a_layer_that_is_no_block() -> None:
    layers = language_model()
    layers[1] = torch.tanh
    for after_layer, what in ((1, "layer 0 is Embedding"), (2, "layer 1 is tanh")):
        with pytest.raises(ConfigError, match=rf"interlock\.head\.type: block_linear .*{what}"):
            build(layers, after_layer=after_layer, type="block_linear")


def test_block_linear_behind_a_layer_that_changes_the_shape() -> None:
    layers = [*language_model()[:1], LayerSpec(nn.Linear, WIDTH, 4), *language_model()[3:]]
    head = build(layers, type="block_linear")
    with pytest.raises(ConfigError, match=r"interlock\.head\.type: .*\[3, 7, 12\] into \[3, 7, 4\]"):
        head(hidden_and_labels()[0])


def test_a_hidden_state_of_another_width() -> None:
    head = build(language_model())
    with pytest.raises(ConfigError, match=r"hidden state is \[3, 5\].* vectors of 12"):
        head(torch.zeros(3, 5))


def test_each_head_has_weights_of_its_own() -> None:
    factory = head_factory(HeadConfig(type="block_linear"), [Block(), *language_model()[3:]])
    first, second = factory(LossHead(0, 1)), factory(LossHead(1, 1))
    assert isinstance(first, AuxiliaryHead)
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not shared
