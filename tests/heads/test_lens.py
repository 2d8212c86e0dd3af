"""The lens: a frozen copy of the model's end behind a translator that starts as the identity."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from engine_jobs import BF16_ZERO_1, Job, outcomes
from head_models import VOCABULARY, WIDTH, Block, NormAndUnembedding, hidden_and_labels, language_model
from ranks import RankPool
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ds_interlock.config import HeadConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead
from ds_interlock.stage.heads import build_head
from ds_interlock.stage.in_process import InProcessPipeline

LM = LMConfig(vocab_size=VOCABULARY, seq_length=7, width=WIDTH, num_blocks=2, num_heads=3, seed=5)
PLACE = LossHead(stage=0, after_layer=3)


def lens(layers: list[Any], **options: Any) -> Any:
    return build_head(head_factory(HeadConfig(type="lens", **options), layers), 0, PLACE)


def randomised(module: nn.Module) -> nn.Module:
    """As if it had been trained: no norm's weight is 1, no bias 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_it_starts_as_the_models_own_end() -> None:
    model = build_lm(LM)
    hidden_btd, _ = hidden_and_labels()
    assert torch.equal(lens(lm_layers(LM))(hidden_btd), model[-1](model[-2](hidden_btd)))


def test_a_tied_unembedding_is_copied() -> None:
    tied = LMConfig(**{**vars(LM), "tie_embeddings": True})
    model = build_lm(tied)
    hidden_btd, _ = hidden_and_labels()
    head = lens(lm_layers(tied))
    torch.testing.assert_close(head(hidden_btd), model[-1](model[-2](hidden_btd)), rtol=1e-6, atol=1e-6)
    assert torch.equal(head.readout.unembedding.weight, model[0].weight)


class SeededEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.tokens.weight, generator=torch.Generator().manual_seed(4))


def unembed(module: SeededEmbeddings, hidden_btd: Tensor) -> Tensor:
    return hidden_btd @ module.tokens.weight.T


def test_a_tied_weight_inside_a_module_is_copied() -> None:
    end = TiedLayerSpec("embed", SeededEmbeddings, forward_fn=unembed, tied_weight_attr="tokens.weight")
    assert torch.equal(lens([LayerSpec(Block), end]).readout.unembedding.weight, end.build().tokens.weight)


@pytest.mark.parametrize("grouped", [False, True], ids=["layers", "sequential"])
@pytest.mark.parametrize("bias", [False, True])
def test_modules_are_copied_by_value(grouped: bool, bias: bool) -> None:
    parts = [randomised(nn.LayerNorm(WIDTH, eps=0.1)), nn.Linear(WIDTH, VOCABULARY, bias=bias), nn.Tanh()]
    head = lens([Block(), *([nn.Sequential(*parts)] if grouped else parts)])
    hidden_btd, _ = hidden_and_labels()
    assert torch.equal(head(hidden_btd), nn.Sequential(*parts)(hidden_btd))
    shared = {id(p) for part in parts for p in part.parameters()} & {id(p) for p in head.parameters()}
    assert not shared


def test_parts_of_one_layer_are_copied() -> None:
    end = randomised(NormAndUnembedding(bias=True))
    hidden_btd, _ = hidden_and_labels()
    expected = end.unembedding(end.norm(hidden_btd))
    assert torch.equal(lens([Block(), end])(hidden_btd), expected)
    assert torch.equal(lens([nn.Sequential(Block(), end)])(hidden_btd), expected)


def test_a_model_without_norm() -> None:
    unembedding = nn.Linear(WIDTH, VOCABULARY)
    hidden_btd, _ = hidden_and_labels()
    assert torch.equal(lens([nn.Linear(WIDTH, WIDTH), unembedding])(hidden_btd), unembedding(hidden_btd))


def test_layers_without_a_seed_of_their_own_are_drawn_from_the_heads() -> None:
    before = torch.get_rng_state()
    first, second = lens(language_model()), lens(language_model())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.readout.unembedding.weight, second.readout.unembedding.weight)


def test_only_the_translator_is_trained() -> None:
    head = lens(lm_layers(LM))
    assert {name: tuple(p.shape) for name, p in head.named_parameters() if p.requires_grad} == {
        "readout.translator.change.weight": (WIDTH, WIDTH),
        "readout.translator.change.bias": (WIDTH,),
    }
    # Frozen weights are part of a checkpoint: the model's own change, and cannot be copied again.
    assert {"readout.norm.weight", "readout.norm.bias", "readout.unembedding.weight"} < set(head.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_a_frozen_unembedding_costs_no_weight_gradient(fused: bool) -> None:
    hidden_btd, labels_bt = hidden_and_labels()
    head = lens(lm_layers(LM), fused=fused)
    hidden_btd.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        head.loss(hidden_btd, labels_bt, lm_loss()).backward()
    positions = labels_bt.numel()
    assert counter.get_total_flops() == positions * WIDTH * (4 * VOCABULARY + 6 * WIDTH)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("translator", ["after_norm", "before_norm"])
def test_gradients_are_those_of_the_formula(translator: str, fused: bool) -> None:
    hidden_btd, labels_bt = hidden_and_labels(num_ignored=4)
    head = randomised(lens(lm_layers(LM), fused=fused, translator=translator)).double()
    hidden_btd = hidden_btd.double().requires_grad_()
    change = head.readout.translator.change
    norm, unembedding = head.readout.norm, head.readout.unembedding

    def translated(x_btd: Tensor) -> Tensor:
        return x_btd + x_btd @ change.weight.T + change.bias

    def normed(x_btd: Tensor) -> Tensor:
        return F.layer_norm(x_btd, (WIDTH,), norm.weight, norm.bias, norm.eps)

    def formula() -> Tensor:
        first, second = (translated, normed) if translator == "before_norm" else (normed, translated)
        logits_nv = (second(first(hidden_btd)) @ unembedding.weight.T).flatten(0, 1)
        return F.cross_entropy(logits_nv, labels_bt.flatten(), ignore_index=-100)

    sources = [hidden_btd, change.weight, change.bias]
    found = torch.autograd.grad(head.loss(hidden_btd, labels_bt, lm_loss()), sources)
    torch.testing.assert_close(found, torch.autograd.grad(formula(), sources), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("bias", [False, True])
def test_behind_the_norm_it_folds_into_the_models_own_end(norm: type[nn.Module], bias: bool) -> None:
    end = [randomised(norm(WIDTH)), nn.Linear(WIDTH, VOCABULARY, bias=bias)]
    head = randomised(lens([Block(), *end])).double()
    change, folded = head.readout.translator.change, nn.Sequential(*end).double()
    assert (change.bias is not None) == (bias or norm is nn.LayerNorm)
    matrix_dd = torch.eye(WIDTH) + change.weight
    folded.load_state_dict({f"0.{k}": v for k, v in head.readout.norm.state_dict().items()}, strict=False)
    folded[1].weight.data = head.readout.unembedding.weight @ matrix_dd
    if bias:
        folded[1].bias.data = head.readout.unembedding(change.bias)
    elif change.bias is not None:
        folded[0].bias.data += torch.linalg.solve(matrix_dd, change.bias)
    hidden_btd = hidden_and_labels()[0].double()
    torch.testing.assert_close(head(hidden_btd), folded(hidden_btd), rtol=1e-9, atol=1e-9)


def test_in_front_of_the_norm_a_translator_always_has_a_bias() -> None:
    end = [nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)]
    readout = lens([Block(), *end], translator="before_norm").readout
    assert [name for name, _ in readout.named_children()] == ["translator", "norm", "unembedding"]
    assert readout.translator.change.bias is not None


def test_a_pretrained_model_gets_a_lens_by_default() -> None:
    layers = lm_layers(LM)
    kinds = {
        pretrained: {
            name for name, _ in head_factory(HeadConfig(), layers, pretrained)(PLACE).named_modules()
        }
        for pretrained in (False, True)
    }
    assert "readout.translator" in kinds[True]
    assert "readout.norm" in kinds[False]
    assert "readout.translator" not in kinds[False]


def test_it_trains_in_a_pipeline_and_keeps_what_is_frozen() -> None:
    plan = GradientFlowPlan.local(stage_bounds=[0, 3, LM.num_layers])
    layers = lm_layers(LM)
    net = InProcessPipeline(
        build_lm(LM), lm_loss(), plan, head_factory(HeadConfig(type="lens", token_fraction=0.5), layers)
    )
    frozen = {name: p.clone() for name, p in net.heads.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (4, 8), generator=generator)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(net.accumulate_gradients([(ids[:, :-1], ids[:, 1:])])[0].item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    assert len(frozen) == 3
    for name, parameter in frozen.items():
        assert torch.equal(net.heads.get_parameter(name), parameter)


@pytest.mark.parametrize("extra", [{}, BF16_ZERO_1], ids=["fp32", "bf16, ZeRO 1"])
def test_the_engine_trains_translators_and_leaves_the_rest(
    ranks4: RankPool, extra: dict[str, object]
) -> None:
    section = {"mode": "interlock", "window": 2, "head": {"type": "lens", "learning_rate_scale": 2.0}}
    job = Job(section, extra=extra)
    for once, longer in zip(*outcomes(ranks4, job.but(num_batches=1), job.but(num_batches=4)), strict=True):
        changed = {name for name, p in once.parameters.items() if not torch.equal(p, longer.parameters[name])}
        of_heads = {name for name in once.parameters if name.startswith("heads.")}
        assert changed & of_heads == {name for name in of_heads if "translator" in name}
        assert changed - of_heads, "the stage itself was not trained"
