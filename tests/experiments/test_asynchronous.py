"""Stale gradients: by hand, as stages that never wait compute them, without staleness, and resumed."""

from pathlib import Path

import pytest
import torch
from test_training import TINY, tiny_run
from torch import Tensor, nn

from ds_interlock import GradientFlowPlan, InProcessPipeline
from experiments import training
from experiments.asynchronous import Method, StaleWeights, delays
from experiments.definition import Definition, Run
from experiments.training import Training

NADAM = {"optimizer": "nadam", "learning_rate": 5e-3, "betas": [0.99, 0.98]}
MODES = {
    "global": TINY["modes"]["global"],
    "PipeDream": {"asynchronous": "pipedream", "training": NADAM},
    "2BW": {"asynchronous": "2bw"},
}


class Scale(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Curved(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.weight * x)


def trained(
    layers: list[Scale], method: Method | None, inputs: list[float], rate: float
) -> list[list[float]]:
    """The weights after each batch; a layer is a stage, the loss is the output."""
    plan = GradientFlowPlan.end_to_end(len(layers))
    net = InProcessPipeline(layers, lambda outputs, labels: outputs, plan)
    stale = StaleWeights([work.parameters for work in net.stages], delays(method, len(layers)))
    optimizer = torch.optim.SGD(net.parameters(), rate)
    weights = []
    for x in inputs:
        with stale.in_force():
            net.accumulate_gradients([(torch.tensor(x, dtype=torch.float64), torch.zeros(()))])
        optimizer.step()
        optimizer.zero_grad()
        weights.append([layer.weight.item() for layer in layers])
    return weights


def test_three_stages_by_hand() -> None:
    """The loss is the product of the weights, so a gradient is that of the two others; all begin at 1."""
    assert trained([Scale(1.0) for _ in range(3)], "pipedream", [1.0] * 4, rate=0.5) == [
        [0.5, 0.5, 0.5],  # at w0(0) w1(0) w2(0) = 1 1 1
        [0.25, 0.25, 0.0],  # at w0(0) w1(0) w2(1) = 1 1 0.5: gradients 0.5 0.5 1
        [0.25, 0.25, -0.25],  # at w0(0) w1(1) w2(2) = 1 0.5 0: gradients 0 0 0.5
        [0.28125, 0.3125, -0.3125],  # at w0(1) w1(2) w2(3) = 0.5 0.25 -0.25: -0.0625 -0.125 0.125
    ]
    assert trained([Scale(1.0) for _ in range(3)], "2bw", [1.0] * 4, rate=0.5) == [
        [0.5] * 3,  # at 1 1 1
        [0.0] * 3,  # at 1 1 1 again
        [-0.125] * 3,  # at 0.5 0.5 0.5: gradients 0.25
        [-0.125] * 3,  # at 0 0 0
    ]


@pytest.mark.parametrize("num_stages", [2, 4])
def test_pipedream_is_what_stages_that_never_wait_compute(num_stages: int) -> None:
    """Each stage runs its own line of the timetable, and keeps the weights of a forward for its backward."""
    values, inputs, rate = [0.9, 1.2, 0.7, 1.1][:num_stages], [0.3, 0.8, 1.1, 0.5, 0.9, 0.2, 0.6], 0.3
    weights = [torch.tensor(value, dtype=torch.float64) for value in values]
    after = [[] for _ in range(num_stages)]
    sent = {(-1, "F", n): torch.tensor(x, dtype=torch.float64) for n, x in enumerate(inputs)}
    sent |= {(num_stages, "B", n): torch.ones((), dtype=torch.float64) for n in range(len(inputs))}
    kept = {}
    orders = []
    for stage in range(num_stages):
        early = num_stages - 1 - stage
        order = [("F", n) for n in range(early)]
        for n in range(len(inputs)):
            order += [("F", n + early), ("B", n)]
        orders.append([(kind, n) for kind, n in order if n < len(inputs)])
    while any(orders):
        for stage, order in enumerate(orders):
            while order:
                kind, n = order[0]
                source = stage - 1 if kind == "F" else stage + 1
                if (source, kind, n) not in sent:
                    break
                message = sent[source, kind, n]
                if kind == "F":
                    x, weight = message.clone().requires_grad_(), weights[stage].clone().requires_grad_()
                    kept[stage, n] = x, weight, torch.sin(weight * x)
                    sent[stage, kind, n] = kept[stage, n][2].detach()
                else:
                    x, weight, output = kept.pop((stage, n))
                    sent[stage, kind, n], gradient = torch.autograd.grad(output, [x, weight], message)
                    weights[stage] = weights[stage] - rate * gradient
                    after[stage].append(weights[stage].item())
                order.pop(0)
    ours = trained([Curved(value) for value in values], "pipedream", inputs, rate)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(after).T, rtol=0, atol=1e-12)
    theirs = trained([Curved(value) for value in values], None, inputs, rate)
    assert (torch.tensor(theirs) - torch.tensor(after).T).abs().max() > 1e-3  # staleness makes a difference


def stale_run(mode: str, **changes: object) -> Run:
    return tiny_run(mode, **{"modes": MODES, **changes})


def test_without_delay_it_is_global_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    unclipped = {**TINY["training"], "max_gradient_norm": None}
    ours, theirs = (Training(stale_run(mode, training=unclipped), "cpu") for mode in ("2BW", "global"))
    stale = Training(stale_run("2BW", training=unclipped), "cpu")
    ours.stale = StaleWeights([work.parameters for work in ours.net.stages], [0, 0, 0])
    for _ in range(4):
        for one in (ours, theirs, stale):
            one.do_step()
    for name, parameter in theirs.net.state_dict().items():
        assert torch.equal(ours.net.state_dict()[name], parameter), name
    assert not torch.equal(stale.net.state_dict()["5.norm.weight"], theirs.net.state_dict()["5.norm.weight"])


@pytest.mark.parametrize("mode", ["PipeDream", "2BW"])
def test_a_resumed_run_goes_on_bit_for_bit(mode: str, tmp_path: Path) -> None:
    undisturbed, stopped, resumed = (Training(stale_run(mode), "cpu") for _ in range(3))
    for number in range(6):
        undisturbed.do_step()
        if number < 3:
            stopped.do_step()
    stopped.save(tmp_path / "a.pt")
    resumed.load(tmp_path / "a.pt")
    for _ in range(3):
        resumed.do_step()
    for name, parameter in undisturbed.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], parameter), name


def test_the_optimizer_is_the_modes_own() -> None:
    (group,) = Training(stale_run("PipeDream"), "cpu").optimizer.param_groups
    assert group["decoupled_weight_decay"]
    assert (group["peak"], group["betas"]) == (5e-3, (0.99, 0.98))
    (group,) = Training(stale_run("2BW"), "cpu").optimizer.param_groups
    assert (group["peak"], group["betas"]) == (1e-2, (0.9, 0.98))


def test_gradients_are_clipped_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped: list[int] = []
    monkeypatch.setattr(
        training.nn.utils, "clip_grad_norm_", lambda parameters, *_, **__: clipped.append(len(parameters))
    )
    for mode, expected in (("PipeDream", 3), ("global", 1)):
        clipped.clear()
        Training(stale_run(mode), "cpu").do_step()
        assert len(clipped) == expected


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({}, 'expected either "interlock" or "asynchronous"'),
        ({"asynchronous": "2bw", "interlock": {"mode": "local"}}, 'expected either "interlock" or "asynch'),
        ({"asynchronous": "3bw"}, "Input should be 'pipedream' or '2bw'"),
        ({"asynchronous": "2bw", "training": {"num_steps": 9}}, "got num_steps, expected only"),
        ({"asynchronous": "2bw", "training": {"learning_rate": 0}}, "greater than 0"),
    ],
)
def test_faults_of_a_mode_are_named(mode: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Definition.model_validate({**TINY, "modes": {**TINY["modes"], "x": mode}})
