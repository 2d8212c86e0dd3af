"""What travels between stages, and what a layer may return elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_interlock import ConfigError, GradientFlowPlan, InProcessPipeline

BOUNDS = (0, 2, 4)
PLANS = {
    "global": GradientFlowPlan.end_to_end(stage_bounds=BOUNDS),
    "local": GradientFlowPlan.local(stage_bounds=BOUNDS),
}
EVERY_PLAN = pytest.mark.parametrize("plan", PLANS)


class Returns(nn.Module):
    """Returns what ``form`` makes of its input, after a weight."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(4, 4), form

    def forward(self, x: Any) -> Any:
        return self.form(self.linear(x))


def train(layers: list[Any], loss_fn: Any, plan: str) -> list[Tensor]:
    """Losses and gradients of one batch."""
    torch.manual_seed(0)
    net = InProcessPipeline(layers, loss_fn, PLANS[plan], lambda _: nn.Identity())
    losses = net.accumulate_gradients([(torch.randn(3, 4), torch.randn(3, 4))] * 2)
    return [*losses.values(), *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.bad_input
@EVERY_PLAN
@pytest.mark.parametrize(
    ("form", "name"),
    [
        (lambda h: (h, None), "a NoneType in a tuple"),
        (lambda h: (h, 3), "a int in a tuple"),
        (lambda h: {"hidden": h}, "a dict"),
        (lambda h: (h, (h, h)), "a tuple in a tuple"),
        (lambda h: [h], "a list"),
        (lambda h: h.to_sparse(), "torch.sparse_coo"),
        (lambda h: torch.complex(h, h), "torch.complex64 that needs a gradient"),
    ],
)
def test_what_cannot_travel_is_refused_by_its_layer(plan: str, form: Any, name: str) -> None:
    layers = [nn.Linear(4, 4), Returns(form), nn.Linear(4, 4), nn.Linear(4, 4)]
    with pytest.raises(ConfigError, match=rf"layer 1, .* returned .*{name}.*a tensor or a tuple of tensors"):
        train(layers, nn.functional.mse_loss, plan)


@EVERY_PLAN
def test_within_a_stage_and_at_the_end_anything_goes(plan: str) -> None:
    torch.manual_seed(1)
    linears = [nn.Linear(4, 4) for _ in range(4)]
    plain = train(linears, nn.functional.mse_loss, plan)

    def first(x: Tensor) -> dict[str, Any]:
        return {"hidden": [linears[0](x), None], "number": 3}

    def second(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return linears[1](x["hidden"][0]), torch.ones(2, dtype=torch.complex64)

    def last(x: Tensor) -> dict[str, Any]:
        return {"logits": torch.complex(linears[3](x), torch.zeros_like(x)), "more": (None, 1)}

    def loss_fn(outputs: Any, labels: Tensor) -> Tensor:
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs["logits"].real
        return nn.functional.mse_loss(outputs, labels)

    wrapped = [_Calls(linears[0], first), _Calls(linears[1], second)]
    wrapped += [_Calls(linears[2], lambda x: linears[2](x[0])), _Calls(linears[3], last)]
    torch.testing.assert_close(train(wrapped, loss_fn, plan), plain, rtol=0, atol=0)


def test_integers_alone_have_nothing_to_relay() -> None:
    def embedded(x: Tensor) -> Tensor:
        return embedding(x.clamp(0, 4)).mean(1)

    torch.manual_seed(1)
    embedding = nn.Embedding(5, 4)
    layers = [nn.Linear(4, 4), lambda x: x.long(), _Calls(embedding, embedded), nn.Linear(4, 4)]
    layers.append(nn.Linear(4, 4))
    plan = GradientFlowPlan.n_wise(window=2, stage_bounds=[0, 2, 3, 4, 5])
    net = InProcessPipeline(layers, nn.functional.mse_loss, plan, lambda _: nn.Identity())
    net.accumulate_gradients([(torch.randn(3, 4), torch.randn(3, 4))] * 2)
    assert [name for name, p in net.named_parameters() if p.grad is None] == ["0.weight", "0.bias"]


class _Calls(nn.Module):
    def __init__(self, owner: nn.Module, function: Any) -> None:
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, x: Any) -> Any:
        return self.function(x)
