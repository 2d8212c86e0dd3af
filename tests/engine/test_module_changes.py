"""What a script may do to the module between batches, and heads that share parameters with layers."""

from typing import Any

import torch
from engine_jobs import Job, loss_fn, make_engine, micro_batches, parameters_of
from ranks import RankPool
from torch import Tensor, nn

from ds_interlock import GradientFlowPlan, InProcessPipeline, LossHead

SECTIONS: dict[str, dict[str, Any] | None] = {
    "DeepSpeed": None,
    "global": {"mode": "global"},
    "local": {"mode": "local"},
}


def doubled(logits_btv: Tensor, labels_bt: Tensor) -> Tensor:
    return 2 * loss_fn(logits_btv, labels_bt)


def change_the_module(section: dict[str, Any] | None) -> dict[str, Any]:
    """Trains with layers that were put to eval(), evaluates, and trains with another loss."""
    engine = make_engine(Job(section, num_stages=2, num_micro_batches=2, dropout=0.5))
    engine.module.eval()
    engine.train_batch(iter(micro_batches(2)))
    if section is not None:
        engine.drain()
    first = parameters_of(engine)
    evaluated = [float(engine.eval_batch(iter(micro_batches(2, seed=9))))]
    modes = {module.training for module in engine.module.modules()}
    engine.module.loss_fn = doubled
    evaluated.append(float(engine.eval_batch(iter(micro_batches(2, seed=9)))))
    engine.train_batch(iter(micro_batches(2, seed=7)))
    if section is not None:
        engine.drain()
    result = {"evaluated": evaluated, "modes": modes, "first": first, "after": parameters_of(engine)}
    engine.destroy()
    return result


def change_all() -> dict[str, dict[str, Any]]:
    return {name: change_the_module(section) for name, section in SECTIONS.items()}


def test_modes_of_layers_and_another_loss_are_as_in_deepspeed(ranks2: RankPool) -> None:
    for results in ranks2.run(change_all):
        theirs = results["DeepSpeed"]
        for name in ("global", "local"):
            before, after = results[name]["evaluated"]
            assert after == 2 * before
            assert results[name]["modes"] == theirs["modes"] == {False}
        assert results["global"]["evaluated"] == theirs["evaluated"]
        for part in ("first", "after"):
            ours = results["global"][part]
            assert all(torch.equal(parameter, ours[name]) for name, parameter in theirs[part].items())


def linears() -> list[nn.Linear]:
    torch.manual_seed(4)
    return [nn.Linear(3, 3) for _ in range(4)]


class Sharing(nn.Sequential):
    """A head that applies a layer of its stage again, and then a layer of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, nn.Linear(3, 3))
        nn.init.eye_(self[1].weight)
        nn.init.zeros_(self[1].bias)


def pairs() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(2, 3, generator=draw), torch.randn(2, 3, generator=draw)) for _ in range(2)]


def train_shared() -> dict[str, Tensor]:
    """A step of SGD with the rate 1."""
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "gradient_clipping": 0.0}
    layers = linears()
    job = Job({"mode": "local"}, num_stages=2, num_micro_batches=2, extra=sgd)
    engine = make_engine(
        job, layers=layers, loss_fn=nn.functional.mse_loss, head=lambda head: Sharing(layers[0])
    )
    before = parameters_of(engine)
    engine.train_batch(iter(pairs()))
    engine.drain()
    gradients = {name: before[name] - parameter for name, parameter in parameters_of(engine).items()}
    engine.destroy()
    return gradients


def test_a_head_that_shares_a_layer_adds_to_its_gradient(ranks2: RankPool) -> None:
    layers, plan = linears(), GradientFlowPlan.local(stage_bounds=[0, 2, 4])

    def head(position: LossHead) -> nn.Module:
        return Sharing(layers[0])

    net = InProcessPipeline(layers, nn.functional.mse_loss, plan, head)
    net.accumulate_gradients(pairs())
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    gradients = {name: g for of_rank in ranks2.run(train_shared) for name, g in of_rank.items()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
