"""Auxiliary heads: what they compute, and what they refuse."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec
from head_models import (
    VOCABULARY,
    WIDTH,
    Block,
    build,
    cross_entropy,
    hidden_and_labels,
    language_model,
)
from torch import Tensor, nn

from ds_interlock.config import HeadConfig
from ds_interlock.errors import ConfigError
from ds_interlock.heads.cross_entropy import linear_cross_entropy
from ds_interlock.heads.factory import AuxiliaryHead, head_factory
from ds_interlock.models.lm import LMLoss
from ds_interlock.schedule.plan import LossHead

TYPES: dict[str, dict[str, Any]] = {
    **{kind: {"type": kind} for kind in ("linear", "norm_linear", "low_rank", "lens")},
    "blocks": {"type": "norm_linear", "blocks": 2},
}
KINDS = pytest.mark.parametrize("kind", TYPES)


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
def test_blocks_repeat_the_layer_in_front(built: bool) -> None:
    layers = language_model()
    layers[1] = Block(eps=0.5) if built else LayerSpec(Block, eps=0.5)
    head = build(layers, blocks=2)
    assert [block.norm.eps for block in head.blocks] == [0.5, 0.5]
    hidden_btd, _ = hidden_and_labels()
    first, second = head.blocks
    torch.testing.assert_close(head(hidden_btd), head.readout(second(first(hidden_btd))))
    if built:  # they start as the model does, whatever its initialisation
        for block in head.blocks:
            torch.testing.assert_close(block.state_dict(), layers[1].state_dict(), rtol=0, atol=0)
    else:
        assert not first.grow.weight.equal(second.grow.weight)


def test_a_list_of_blocks_is_by_stage_and_a_block_may_be_some_layers() -> None:
    two = lambda after_layer: range(after_layer - 2, after_layer)  # noqa: E731
    factory = head_factory(HeadConfig(blocks=[2, 0, 1]), language_model(), block=two)
    assert [len(factory(LossHead(stage, 3)).blocks) for stage in range(5)] == [4, 0, 2, 2, 2]


@KINDS
def test_of_a_tuple_the_first_is_the_hidden_state(kind: str) -> None:
    head = build(language_model(), **TYPES[kind])
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
    head = build(language_model(), blocks=1, token_fraction=0.3).train()
    seen = []
    head.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
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


# sequence_fraction.


def test_a_share_of_the_sequences_is_an_unbiased_estimate_from_whole_rows() -> None:
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=4)
    head = build(language_model(), blocks=1, sequence_fraction=0.5).train()
    normaliser = torch.full((1,), 17.0)
    seen, losses = [], []
    head.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        for _ in range(20):
            losses.append(head.loss((hidden_btd, torch.ones(3, 7)), (labels_bt, normaliser), LMLoss()))
        exact = head.eval().loss(hidden_btd, (labels_bt, normaliser), LMLoss())
        by_row = [LMLoss()(head(hidden_btd[[n]]), (labels_bt[[n]], normaliser / 3)) for n in range(3)]
    assert all(len(rows) == 2 for rows, _ in seen[:20]), "two of three sequences, and their rows of the mask"
    assert all(len(mask) == 2 for _, mask in seen[:20])
    torch.testing.assert_close(sum(by_row) / 3, exact)
    pairs = [(by_row[a] + by_row[b]) / 2 for a, b in ((0, 1), (0, 2), (1, 2))]
    drawn = [min(range(3), key=lambda n: abs(pairs[n] - loss)) for loss in losses]
    torch.testing.assert_close(torch.stack(losses), torch.stack([pairs[n] for n in drawn]))
    assert set(drawn) == {0, 1, 2}


@pytest.mark.parametrize("labels", [torch.zeros(2, 7, dtype=torch.long), (1, 2)])
def test_sequences_are_drawn_where_labels_have_a_row_for_each(labels: Any) -> None:
    head = build(language_model(), sequence_fraction=0.3).train()
    with pytest.raises(ConfigError, match=r"interlock\.head\.sequence_fraction: 0\.3 needs labels"):
        head.loss(hidden_and_labels()[0], labels, cross_entropy)


# Nothing to draw from, or nothing that can be.


def test_no_label_at_all_is_left_to_the_loss_function() -> None:
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=21)
    head = build(language_model(), token_fraction=0.3).train()
    loss = head.loss(hidden_btd, labels_bt, lambda logits, labels: logits.sum() + labels.numel())
    assert loss == 0


@pytest.mark.bad_input
@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.long), torch.zeros(3, 7, 1), (1, 2)])
def test_sampling_needs_a_label_for_each_position(labels: Any) -> None:
    head = build(language_model(), token_fraction=0.3).train()
    with pytest.raises(ConfigError, match=r"interlock\.head\.token_fraction: 0\.3 needs one label"):
        head.loss(hidden_and_labels()[0], labels, cross_entropy)


# Unembedding and loss in one.


class CountingLoss(LMLoss):
    """The language model's loss; counts how it was asked for."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.asked = {"logits": 0, "fused": 0}

    def forward(self, logits_btv: Tensor, labels_bt: Tensor) -> Tensor:
        self.asked["logits"] += 1
        return super().forward(logits_btv, labels_bt)

    def fused_linear(self, *args: Any) -> Tensor:
        self.asked["fused"] += 1
        return super().fused_linear(*args)


def loss_and_gradients(head: nn.Module, loss_fn: LMLoss) -> list[Tensor]:
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=4)
    hidden_btd = hidden_btd.double().requires_grad_()
    torch.manual_seed(3)  # of the positions that are sampled
    loss = head.double().loss(hidden_btd, labels_bt, loss_fn)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, [hidden_btd, *trained])]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("token_fraction", [1.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
@KINDS
def test_the_numbers_are_the_same_fused_or_not(
    kind: str, bias: bool, token_fraction: float, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks = partial(linear_cross_entropy, chunk_bytes=3 * VOCABULARY * 8, backend="chunked")
    monkeypatch.setattr("ds_interlock.heads.lm_loss.linear_cross_entropy", in_chunks)
    found = {}
    for fused in (False, True):
        loss_fn = CountingLoss(label_smoothing=0.2).train(training)
        head = build(language_model(bias=bias), token_fraction=token_fraction, fused=fused, **TYPES[kind])
        found[fused] = loss_and_gradients(head.train(training), loss_fn)
        assert loss_fn.asked == {"logits": int(not fused), "fused": int(fused)}
    torch.testing.assert_close(found[True], found[False], rtol=1e-12, atol=1e-14)


def test_a_loss_function_that_cannot_fuse_gets_the_outputs() -> None:
    hidden_btd, labels_bt = hidden_and_labels()
    head = build(language_model())
    loss = head.loss(hidden_btd, labels_bt, cross_entropy)
    torch.testing.assert_close(loss, cross_entropy(head(hidden_btd), labels_bt))


def test_what_follows_the_unembedding_is_never_skipped() -> None:
    hidden_btd, labels_bt = hidden_and_labels()
    head = build([*language_model(), lambda outputs: 5 * outputs])
    loss_fn = CountingLoss()
    loss = head.loss(hidden_btd, labels_bt, loss_fn)
    assert loss_fn.asked == {"logits": 1, "fused": 0}
    torch.testing.assert_close(loss, cross_entropy(head(hidden_btd), labels_bt))


# What is refused.


@pytest.mark.bad_input
def test_blocks_behind_a_layer_that_is_no_block() -> None:
    layers = language_model()
    layers[1] = torch.tanh
    for after_layer, what in ((1, "layer 0 is Embedding"), (2, "layer 1 is tanh")):
        with pytest.raises(ConfigError, match=rf"interlock\.head\.blocks: .*{what}"):
            build(layers, after_layer=after_layer, blocks=1)


@pytest.mark.bad_input
def test_blocks_behind_a_layer_that_changes_the_shape() -> None:
    layers = [*language_model()[:1], LayerSpec(nn.Linear, WIDTH, 4), *language_model()[3:]]
    head = build(layers, blocks=1)
    with pytest.raises(ConfigError, match=r"interlock\.head\.blocks: .*\[3, 7, 12\] into \[3, 7, 4\]"):
        head(hidden_and_labels()[0])


@pytest.mark.bad_input
def test_a_hidden_state_of_another_width() -> None:
    head = build(language_model())
    with pytest.raises(ConfigError, match=r"hidden state is \[3, 5\].* vectors of 12"):
        head(torch.zeros(3, 5))


def test_each_head_has_weights_of_its_own() -> None:
    factory = head_factory(HeadConfig(blocks=1), [Block(), *language_model()[3:]])
    first, second = factory(LossHead(0, 1)), factory(LossHead(1, 1))
    assert isinstance(first, AuxiliaryHead)
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not shared
