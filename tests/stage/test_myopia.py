"""The myopia meter in one process, against plain autograd, and that it leaves no trace."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_interlock import GradientFlowPlan, InProcessPipeline, LossHead
from ds_interlock.stage.myopia import gradient_cosines

WIDTH, NUM_CLASSES, NUM_STAGES = 6, 4, 4
BOUNDS = [0, 2, 5, 7, 10]


class Noise(nn.Module):
    """Dropout, batch norm, and a head's own draws: all that a measurement could disturb."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(torch.tanh(self.norm(self.linear(hidden))))


class RandomHead(nn.Linear):
    """Looks at a random half of the samples."""

    def __init__(self) -> None:
        super().__init__(WIDTH, NUM_CLASSES)

    def loss(self, hidden: Tensor, labels: Tensor, loss_fn: Any) -> Tensor:
        chosen = torch.randperm(len(hidden))[: len(hidden) // 2]
        return loss_fn(self(hidden[chosen]), labels[chosen])


def make_net(plan: GradientFlowPlan, *, random: bool = True) -> InProcessPipeline:
    torch.manual_seed(5)
    layers = [Noise(0.3 if random else 0.0) for _ in range(BOUNDS[-1] - 1)]
    head = RandomHead if random else lambda: nn.Linear(WIDTH, NUM_CLASSES)
    return InProcessPipeline(
        [*layers, nn.Linear(WIDTH, NUM_CLASSES)], F.cross_entropy, plan, lambda place: head()
    )


def n_wise(window: float, **options: Any) -> GradientFlowPlan:
    return GradientFlowPlan.n_wise(window=window, stage_bounds=BOUNDS, **options)


def make_batch(num: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, WIDTH), torch.randint(0, NUM_CLASSES, (8,))) for _ in range(num)]


@pytest.mark.parametrize("window", [1, 1.5, 2, 3, 4])
def test_the_last_stage_sees_all_and_the_others_what_their_window_shows(window):
    cosines = gradient_cosines(make_net(n_wise(window)), make_batch(3))
    assert len(cosines) == NUM_STAGES
    assert cosines[-1] == 1.0
    seeing = math.floor(window)
    # Under "sum" a stage near the end hears other losses too, if later heads reach back that far.
    assert all(-1 <= value < 0.999 for value in cosines[: NUM_STAGES - seeing])
    if window == NUM_STAGES:
        assert cosines == [1.0] * NUM_STAGES


def test_with_the_farthest_loss_only_every_stage_near_the_end_sees_all():
    cosines = gradient_cosines(make_net(n_wise(2, combine="farthest")), make_batch(3))
    assert cosines[2:] == [1.0, 1.0]
    assert max(cosines[:2]) < 0.999


def test_against_the_gradients_that_training_would_give():
    plan = n_wise(2, head_weight=0.7)
    batch = make_batch(3)

    def gradients(plan: GradientFlowPlan) -> list[Tensor]:
        net = make_net(plan, random=False)
        for micro_batch in batch:
            net.accumulate_gradients([micro_batch])
        return [
            torch.cat([p.grad.flatten() for p in net.layer_parameters(stage)]) for stage in range(NUM_STAGES)
        ]

    expected = [
        F.cosine_similarity(a, b, dim=0).item()
        for a, b in zip(gradients(plan), gradients(n_wise(4)), strict=True)
    ]
    assert gradient_cosines(make_net(plan, random=False), batch) == pytest.approx(expected, abs=1e-5)


def test_nothing_is_changed():
    net = make_net(n_wise(1.5))
    net.accumulate_gradients(make_batch(2))
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    plan, random_state, batch = net.plan, torch.get_rng_state(), make_batch(2)
    torch.set_rng_state(random_state)
    cosines = gradient_cosines(net, batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not net.training
    assert net.plan is plan
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    assert gradient_cosines(net, batch) == cosines


def test_a_frozen_stage_has_no_direction():
    net = make_net(n_wise(2))
    for layer in net.layers_in_order[2:5]:
        layer.requires_grad_(False)
    cosines = gradient_cosines(net, make_batch(1))
    assert math.isnan(cosines[1])
    assert not any(math.isnan(value) for value in (cosines[0], *cosines[2:]))


def test_a_gradient_of_zero_has_no_direction():
    net = make_net(GradientFlowPlan.local(stage_bounds=BOUNDS))
    nn.init.zeros_(net.heads["0"].weight)
    cosines = gradient_cosines(net, make_batch(1))
    assert math.isnan(cosines[0])
    assert cosines[-1] == 1.0


def test_a_plan_is_changed_and_heads_stay_where_they_were():
    local, wider = n_wise(1), n_wise(2)
    net = make_net(local)
    built = dict(net.heads)
    net.change_plan(wider)
    assert net.plan == wider
    assert dict(net.heads) == built
    assert LossHead(1, 5) in wider.heads
    net.accumulate_gradients(make_batch(2))
    assert all(p.grad is None for p in net.heads["0"].parameters())
    assert all(p.grad is not None for p in net.heads["1"].parameters())
