"""What a stage has sent stays as it was, since a send reads it later; and few of it are copies."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_interlock import GradientFlowPlan, InProcessPipeline
from ds_interlock.schedule.action import Action
from ds_interlock.stage.backward import Backward, LayerPass
from ds_interlock.stage.hidden import copied
from ds_interlock.stage.in_process import _Mailbox

WIDTH = 4
PLANS = {"global": GradientFlowPlan.end_to_end(3), "window 2": GradientFlowPlan.n_wise(3, 2)}
INPUTS = torch.arange(24.0).reshape(3, 2, WIDTH) / 24


class Static(torch.autograd.Function):
    """Twice its input, always in the same memory, as a replayed CUDA graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor) -> Tensor:
        return torch.mul(x, 2, out=memory).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 2 * gradient, None


class Layer(nn.Module):
    """A layer of a weight as large as the hidden state, and memory of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(2, WIDTH))
        self.memory = torch.zeros(2, WIDTH)

    def forward(self, x: Tensor) -> Any:
        w, memory = self.weight, self.memory
        match self.kind:
            case "buffer":
                return x * w, memory.add_(1)
            case "buffer with a history":
                return memory.detach().copy_(x * w)
            case "function":
                return Static.apply(x * w, memory)
            case "parameter":
                return x * w, w
            case "view of a parameter":
                return x * w, w[0]
            case "gradients of one memory":
                return 2 * (x.flatten() + w.flatten()).view(2, WIDTH)
            case "gradients in the memory of what came":
                return (x.flatten() + w.flatten()).view(2, WIDTH)
            case kind:
                raise ValueError(kind)


class First(nn.Module):
    """A linear map of the first of what it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Tensor:
        return self.linear(x[0] if isinstance(x, tuple) else x)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "kind",
    [
        *("buffer", "buffer with a history", "function", "parameter", "view of a parameter"),
        *("gradients of one memory", "gradients in the memory of what came"),
    ],
)
def test_what_was_sent_stays_as_it_was(monkeypatch: pytest.MonkeyPatch, kind: str, plan: str) -> None:
    sent: list[tuple[Any, Any]] = []
    send_at_once = _Mailbox.send

    def send(mailbox: _Mailbox, action: Action, batch: int, *structures: Any) -> None:
        sent.append((structures, copied(structures)))
        send_at_once(mailbox, action, batch, *structures)

    monkeypatch.setattr(_Mailbox, "send", send)
    torch.manual_seed(0)
    net = InProcessPipeline([First(), Layer(kind), First()], F.mse_loss, PLANS[plan], lambda _: First())
    data = [(x, x.flip(0)) for x in INPUTS]
    for _ in range(2):
        net.accumulate_gradients(data)
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        net.evaluate(data)
    for now, then in sent:
        torch.testing.assert_close(now, then, rtol=0, atol=0)


@pytest.mark.parametrize(
    "layer", [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())]
)
def test_what_usual_layers_give_is_sent_without_a_copy(layer: nn.Module) -> None:
    plan = GradientFlowPlan.end_to_end(2)
    work = InProcessPipeline([layer, nn.Identity()], F.mse_loss, plan).stages[0]
    inputs, mask = INPUTS, torch.ones(2, dtype=torch.bool)
    work.run_layers = lambda hidden, start, stop: (layer(hidden[0]), *hidden)
    work.feed(0, (inputs, mask), None)
    work.run(Action.parse("0F0"))
    once, again = work.output(0)[0], work.output(0)[0]
    assert [part.data_ptr() for part in once] == [part.data_ptr() for part in again]
    assert [part.data_ptr() for part in once[1:]] == [inputs.data_ptr(), mask.data_ptr()]
    x = INPUTS.clone().requires_grad_()
    (gradient,) = Backward().walk_back(LayerPass([layer(x)], [INPUTS], [], False), (x,))
    assert gradient is x.grad
