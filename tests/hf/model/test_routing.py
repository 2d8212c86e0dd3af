"""The balance of experts is part of every loss: exactly transformers' own where the final loss trains all."""

import dataclasses
from typing import Any

import pytest
import torch
from families import NUM_BLOCKS, tiny_model
from test_cut import PADDED, PLAIN, SINGLE_ONLY, batch, blueprint_of, gradients_by_name
from torch import Tensor, nn

from ds_interlock import GradientFlowPlan, InProcessPipeline
from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.cut import Blueprint, build_all
from ds_interlock.hf.model.routing import BalancedLMLoss, find_routing
from ds_interlock.models.lm import lm_loss

COEFFICIENT = 0.5
BOUNDS = (0, 2, 4, NUM_BLOCKS + 3)


def mixture(family: str, inputs: tuple[str, ...], balanced: bool) -> tuple[Any, Blueprint]:
    changes = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT} if balanced else {}
    model = tiny_model(family, **changes)
    blueprint = blueprint_of(model, inputs)
    return model, dataclasses.replace(blueprint, routing=find_routing(blueprint.skeleton.model))


def pipeline(blueprint: Blueprint, plan: GradientFlowPlan, **heads: Any) -> InProcessPipeline:
    loss_fn = BalancedLMLoss(blueprint.routing) if blueprint.routing else lm_loss()
    return InProcessPipeline(build_all(blueprint.layers()), loss_fn, plan, **heads)


@pytest.mark.parametrize("inputs", [PLAIN, PADDED], ids=lambda inputs: inputs[-1])
@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "not balanced"])
@pytest.mark.parametrize("family", sorted(SINGLE_ONLY))
def test_global_has_transformers_loss_and_gradients(
    family: str, balanced: bool, inputs: tuple[str, ...]
) -> None:
    model, blueprint = mixture(family, inputs, balanced)
    # DeepSeek's routers are balanced by biases: transformers adds nothing to its loss.
    assert (blueprint.routing is not None) == (balanced and family != "deepseek_v3")
    given = batch(inputs)
    labels = given["input_ids"].masked_fill(given.get("attention_mask", torch.tensor(1)) == 0, -100)
    expected = model(**given, labels=labels, use_cache=False).loss
    expected.backward()
    net = pipeline(blueprint, GradientFlowPlan.end_to_end(stage_bounds=BOUNDS))
    shifted = labels.roll(-1, 1)
    shifted[:, -1] = -100
    fed: Any = tuple(given.values()) if len(given) > 1 else given["input_ids"]
    losses = net.accumulate_gradients([(fed, shifted)])
    assert losses[net.plan.final].item() == pytest.approx(expected.item(), abs=1e-5)
    got = gradients_by_name(net)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


class Readout(nn.Module):
    """A head without weights: the hidden state's first entries are logits."""

    def forward(self, hidden: tuple[Tensor, ...]) -> Tensor:
        return hidden[0]


@pytest.mark.parametrize("window", [1, 2])
def test_a_head_balances_the_routers_that_it_trains(window: int) -> None:
    _, blueprint = mixture("mixtral", PLAIN, balanced=True)
    assert blueprint.routing is not None
    ids = batch(PLAIN)["input_ids"] % 30  # a readout of 32 entries
    plan = GradientFlowPlan.n_wise(None, window, stage_bounds=BOUNDS, combine="farthest")
    net = pipeline(blueprint, plan, head=lambda _: Readout())
    losses = net.accumulate_gradients([(ids, ids)])
    got = gradients_by_name(net)
    # By hand: the first head, whose loss trains the stages that it reaches back to.
    layers = build_all(blueprint.layers())
    hidden: Any = ids
    for layer in layers[: BOUNDS[window]]:
        hidden = layer(hidden)
    loss = lm_loss()(hidden[0], ids) + COEFFICIENT * blueprint.routing.balance(hidden[-1])
    loss.backward()
    assert losses[0].item() == pytest.approx(loss.item(), abs=1e-6)
    name = "model.layers.0.mlp.gate.weight"
    assert isinstance(layers[1], nn.Module)
    torch.testing.assert_close(got[name], dict(layers[1].named_parameters())[name].grad, rtol=1e-4, atol=1e-7)
    net.eval()
    assert BalancedLMLoss(blueprint.routing).eval().beside(hidden) == 0  # evaluations stay comparable


@pytest.mark.bad_input
def test_a_balance_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, blueprint = mixture("mixtral", PLAIN, balanced=True)
    module = "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func"
    monkeypatch.setattr(module, lambda *_: torch.tensor(7.0))
    with pytest.raises(ConfigError, match="in a way of its own"):
        find_routing(blueprint.skeleton.model)
