"""The shared readout: a norm and a temperature before copies of the live unembedding, renewed on time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_models import VOCABULARY, WIDTH, build, hidden_and_labels, language_model
from torch import Tensor, nn

from ds_interlock import ConfigError, GradientFlowPlan, InProcessPipeline
from ds_interlock.config import HeadConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.stage.shared_readout import SharedReadout

LM = LMConfig(vocab_size=VOCABULARY, seq_length=7, width=WIDTH, num_blocks=2, num_heads=3, seed=5)
BOUNDS = [0, 2, 3, 4, 6]
PLAN = GradientFlowPlan.n_wise(None, 2, stage_bounds=BOUNDS)
LOSS = lm_loss()


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pipeline(model: nn.Module, plan: GradientFlowPlan = PLAN, **head: Any) -> InProcessPipeline:
    config = HeadConfig(type="shared", **head)
    return InProcessPipeline(model, LOSS, plan, head_factory(config, list(model)))


def batch(step: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (2, 3, 8), generator=generator)
    return [(ids_bt[:, :-1], ids_bt[:, 1:]) for ids_bt in ids]


def truncated_gradients(net: InProcessPipeline, unembedding: Tensor, step: int) -> dict[str, Tensor]:
    """Every gradient of a step by plain autograd, with heads that read with ``unembedding``."""
    layers, names = net.layers_in_order, {p: name for name, p in net.named_parameters()}
    gradients: dict[str, Tensor] = {}

    def run(hidden: Tensor, start: int, stop: int) -> Tensor:
        for layer in layers[start:stop]:
            hidden = layer(hidden)
        return hidden

    def add(loss: int, hidden: Tensor, labels: Tensor, parameters: list[nn.Parameter]) -> None:
        if loss != net.plan.final:
            readout = net.heads[str(loss)].readout
            hidden = F.linear(readout.norm(hidden) * readout.temperature.log_scale.exp(), unembedding)
        value = F.cross_entropy(hidden.flatten(0, 1), labels.flatten()) / 2
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            gradients[names[parameter]] = gradients.get(names[parameter], 0) + gradient

    for inputs, labels in batch(step):
        for stage, losses in enumerate(net.plan.trained_by):
            start, stop = net.plan.stage_bounds[stage : stage + 2]
            constant = run(inputs, 0, start).detach()
            for loss in losses:
                end = max(stop, net.plan.heads[loss].after_layer)
                add(loss, run(constant, start, end), labels, net.layer_parameters(stage))
        for loss in range(net.plan.final):
            hidden = run(inputs, 0, net.plan.heads[loss].after_layer).detach()
            add(loss, hidden, labels, [p for p in net.heads[str(loss)].parameters() if p.requires_grad])
    return gradients


@pytest.mark.usefixtures("_float64")
def test_gradients_are_autograds_with_the_copy_that_the_number_of_the_batch_names() -> None:
    model = build_lm(LM).double()
    net = pipeline(model, refresh_every=2)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    live = []
    for step, of_batch in enumerate([None, None, 0, 0, 2, 2, 4]):
        live.append(model[-1].weight.detach().clone())
        expected = truncated_gradients(net, live[of_batch or 0], step)
        net.accumulate_gradients(batch(step))
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()  # none of a head's unembedding
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10)
        optimizer.step()
        optimizer.zero_grad()
    assert net.heads["0"].readout.temperature.log_scale.abs() > 1e-4


def test_it_starts_as_the_models_own_end() -> None:
    model = build_lm(LM)
    hidden_btd, _ = hidden_and_labels()
    assert torch.equal(build(lm_layers(LM), type="shared")(hidden_btd), model[-1](model[-2](hidden_btd)))


def test_what_it_learns() -> None:
    head = build(language_model(bias=True), type="shared", blocks=1)
    learns = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    readout = {name for name in learns if name.startswith("readout")}
    assert readout == {"readout.norm.weight", "readout.norm.bias", "readout.temperature.log_scale"}
    assert len(learns - readout) == 6  # the block's
    assert head.readout.unembedding.bias is not None


def test_a_resumed_pipeline_goes_on_as_if_undisturbed() -> None:
    def steps(net: InProcessPipeline, numbers: range) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(net.parameters(), 0.5)
        for step in numbers:
            net.accumulate_gradients(batch(step))
            optimizer.step()
            optimizer.zero_grad()
        return net.state_dict()

    undisturbed = steps(pipeline(build_lm(LM), refresh_every=3), range(8))
    first, second = (pipeline(build_lm(LM), refresh_every=3) for _ in range(2))
    second.load_state_dict(steps(first, range(4)))
    resumed = steps(second, range(4, 8))
    assert resumed.pop("shared._extra_state") == undisturbed.pop("shared._extra_state") == 8
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


def test_heads_of_a_later_plan_read_with_the_copy_in_use() -> None:
    model = build_lm(LM)
    fewer = GradientFlowPlan.n_wise(None, 2, stage_bounds=BOUNDS, head_stride=2)
    net = pipeline(model, fewer, refresh_every=2)
    for step in range(3):
        with torch.no_grad():
            model[-1].weight.fill_(step)
        net.accumulate_gradients(batch(step))
    net.change_plan(PLAN)
    copies = SharedReadout.copies_in(net.heads.values())
    assert len(copies) == 2
    assert {copy.weight.data_ptr() for copy in copies} == {copies[0].weight.data_ptr()}
    assert (copies[0].weight == 0).all()
    assert (net.shared.next_weight == 2).all()


def test_a_frozen_unembedding_is_not_copied_again() -> None:
    model = build_lm(LM)
    model[-1].requires_grad_(False)
    net = pipeline(model, refresh_every=1)
    initial = model[-1].weight.clone()
    with torch.no_grad():
        model[-1].weight.zero_()
    for step in range(3):
        net.accumulate_gradients(batch(step))
    assert torch.equal(net.shared.in_use[0], initial)


def test_a_model_whose_last_layer_is_not_what_heads_were_derived_from_is_refused() -> None:
    model = build_lm(LM)
    make_head = head_factory(HeadConfig(type="shared"), list(model))
    net = InProcessPipeline([*model[:-1], lambda hidden: model[-1](hidden)], LOSS, PLAN, make_head)
    with pytest.raises(ConfigError, match="layer 5 is function, which lacks the unembedding weight"):
        net.accumulate_gradients(batch(0))
