"""One process, float64: every gradient against plain autograd on the truncated graph."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_interlock import ConfigError, GradientFlowPlan, InProcessPipeline, LossHead

WIDTH, NUM_CLASSES = 5, 3
WEIGHT = 0.7  # of auxiliary losses


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(torch.float32)


def make_layers(num_layers: int) -> list[nn.Module]:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(num_layers - 1)]
    return [*blocks, nn.Linear(WIDTH, NUM_CLASSES)]


def make_head(head: LossHead) -> nn.Module:
    return nn.Linear(WIDTH, NUM_CLASSES)


def make_batch(num_micro_batches: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(size, WIDTH), torch.randint(0, NUM_CLASSES, (size,))) for _ in range(num_micro_batches)
    ]


# The oracle: section 2 of the design, word for word, with nothing but torch.autograd.


def truncated_gradients(
    layers: list[nn.Module],
    heads: dict[int, nn.Module],
    plan: GradientFlowPlan,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: list[tuple[Any, Any]],
) -> dict[nn.Parameter, Tensor]:
    """What every parameter's gradient must be."""

    def run(hidden: Any, start: int, stop: int) -> Any:
        for layer in layers[start:stop]:
            hidden = layer(hidden)
        return hidden

    def loss_of(index: int, hidden: Any, labels: Any) -> Tensor:
        outputs = heads[index](hidden) if index in heads else hidden
        return plan.heads[index].weight * loss_fn(outputs, labels) / len(batch)

    gradients: dict[nn.Parameter, Tensor] = {}

    def add(loss: Tensor, modules: list[nn.Module]) -> None:
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        values = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
        for parameter, gradient in zip(parameters, values, strict=True):
            if gradient is not None:
                gradients[parameter] = gradients.get(parameter, 0) + gradient

    for inputs, labels in batch:
        for stage, losses in enumerate(plan.trained_by):
            start, stop = plan.stage_bounds[stage], plan.stage_bounds[stage + 1]
            constant = detached(run(inputs, 0, start))
            for index in losses:
                loss = loss_of(index, run(constant, start, plan.heads[index].after_layer), labels)
                add(loss, layers[start:stop])
        for index, head in heads.items():
            constant = detached(run(inputs, 0, plan.heads[index].after_layer))
            add(loss_of(index, constant, labels), [head])
    return gradients


def detached(hidden: Any) -> Any:
    return tuple(t.detach() for t in hidden) if isinstance(hidden, tuple) else hidden.detach()


def assert_gradients_are_truncated(
    net: InProcessPipeline, loss_fn: Callable[[Any, Any], Tensor], batch: list[tuple[Any, Any]]
) -> None:
    net.zero_grad()
    net.accumulate_gradients(batch)
    heads = {int(index): head for index, head in net.heads.items()}
    expected = truncated_gradients(net.layers_in_order, heads, net.plan, loss_fn, batch)
    assert expected
    for name, parameter in net.named_parameters():
        if parameter in expected:
            assert parameter.grad is not None, name
            torch.testing.assert_close(
                parameter.grad, expected[parameter], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert parameter.grad is None, f"{name} should have no gradient"


# Plans.


def uneven_bounds(num_stages: int) -> list[int]:
    """Two layers a stage, three in every other one, four in the last."""
    bounds = [0]
    for stage in range(num_stages):
        bounds.append(bounds[-1] + (4 if stage == num_stages - 1 else 2 + stage % 2))
    return bounds


def plans() -> Iterator[Any]:
    for num_stages in range(1, 6):
        bounds = uneven_bounds(num_stages)
        for window in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5):
            for combine in ("sum", "farthest"):
                if window <= num_stages:
                    plan = GradientFlowPlan.n_wise(
                        window=window, combine=combine, stage_bounds=bounds, head_weight=WEIGHT
                    )
                    yield pytest.param(plan, id=f"{num_stages} stages, window {window}, {combine}")
        plan = GradientFlowPlan.deep_supervision(stage_bounds=bounds, head_weight=WEIGHT)
        yield pytest.param(plan, id=f"{num_stages} stages, deep supervision")
    for window, stride, combine in ((2, 2, "sum"), (3, 2, "sum"), (3, 3, "farthest"), (2.5, 2, "sum")):
        plan = GradientFlowPlan.n_wise(
            window=window,
            combine=combine,
            head_stride=stride,
            stage_bounds=uneven_bounds(5),
            head_weight=WEIGHT,
        )
        yield pytest.param(plan, id=f"5 stages, window {window}, stride {stride}, {combine}")


@pytest.mark.parametrize("plan", list(plans()))
def test_every_gradient_is_that_of_the_truncated_graph(plan):
    net = InProcessPipeline(make_layers(plan.num_layers), F.cross_entropy, plan, make_head)
    for num_micro_batches in (1, 3, 7):
        assert_gradients_are_truncated(net, F.cross_entropy, make_batch(num_micro_batches))


def test_a_plan_that_skips_and_repeats_stages():
    """Losses may train any stages before them; what lies between is relayed through."""
    plan = GradientFlowPlan(
        stage_bounds=(0, 2, 3, 5, 6),
        heads=(LossHead(0, 2, 0.3), LossHead(2, 4, WEIGHT), LossHead(2, 5, 2.0), LossHead(3, 6)),
        trained_by=({0, 1, 3}, {2, 3}, {2}, {3}),
    )
    net = InProcessPipeline(make_layers(6), F.cross_entropy, plan, make_head)
    assert_gradients_are_truncated(net, F.cross_entropy, make_batch(5))


# By hand.


class Scale(nn.Module):
    """x -> w * x."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden


def half_square(output: Tensor, label: Tensor) -> Tensor:
    return ((output - label) ** 2 / 2).sum()


def test_two_stages_by_hand():
    # Stage 0: h = a x, stage 1: y = b h, head at the end of stage 0: z = c h; a = 2, b = 3, c = 5.
    # One micro-batch x = 1, label 4:   h = 2, y = 6, z = 10.
    # Final loss (y - 4)^2 / 2 = 2, its derivative by y is 2; the head's (z - 4)^2 / 2 = 18, by z 6.
    def gradients(plan: GradientFlowPlan) -> tuple[list[float], dict[int, float]]:
        net = InProcessPipeline([Scale(2.0), Scale(3.0)], half_square, plan, lambda head: Scale(5.0))
        losses = net.accumulate_gradients([(torch.tensor([1.0]), torch.tensor([4.0]))])
        return [p.grad.item() for p in net.parameters()], {i: v.item() for i, v in losses.items()}

    # Local, head weight 0.5: a sees the head only, 0.5 * 6 * c * x = 15. b: 2 * h = 4. c: 0.5 * 6 * h = 6.
    assert gradients(GradientFlowPlan.n_wise(2, 1, head_weight=0.5)) == ([15.0, 4.0, 6.0], {0: 18.0, 1: 2.0})
    # Global: a sees the final loss only, 2 * b * x = 6. There is no head.
    net = GradientFlowPlan.end_to_end(2)
    assert InProcessPipeline([Scale(2.0), Scale(3.0)], half_square, net, Scale).heads.keys() == set()
    assert gradients(net) == ([6.0, 4.0], {0: 2.0})
    # Deep supervision: a sees both, 15 + 6.
    both = GradientFlowPlan.deep_supervision(2, head_weight=0.5)
    assert gradients(both) == ([21.0, 4.0, 6.0], {0: 18.0, 1: 2.0})


def test_losses_are_means_over_micro_batches():
    # y = 2 x against 0: losses 2 x^2 = 2, 8 and 18 for x = 1, 2, 3; d/dw mean(w^2 x^2 / 2) = w mean(x^2).
    net = InProcessPipeline([Scale(2.0)], half_square, GradientFlowPlan.end_to_end(1))
    batch = [(torch.tensor([x]), torch.tensor([0.0])) for x in (1.0, 2.0, 3.0)]
    assert net.accumulate_gradients(batch)[0].item() == pytest.approx(28 / 3, rel=1e-15)
    assert next(net.parameters()).grad.item() == pytest.approx(2 * 14 / 3, rel=1e-15)


# What flows through.


class MaskedBlock(nn.Module):
    """Takes and gives a hidden state and an integer mask."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        states, mask = hidden
        return states + torch.tanh(self.linear(states)) * mask.unsqueeze(-1), mask


class MaskedHead(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, NUM_CLASSES)

    def forward(self, hidden: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(hidden[0])


@pytest.mark.parametrize("window", [1, 1.5, 2, 3, 4])
def test_hidden_states_that_are_tuples_with_integers(window):
    plan = GradientFlowPlan.n_wise(window=window, stage_bounds=[0, 2, 4, 6, 8], head_weight=WEIGHT)
    net = InProcessPipeline(
        [*(MaskedBlock() for _ in range(7)), MaskedHead()], F.cross_entropy, plan, lambda head: MaskedHead()
    )
    batch = [((inputs, torch.randint(0, 2, (4,))), labels) for inputs, labels in make_batch(3)]
    assert_gradients_are_truncated(net, F.cross_entropy, batch)


class TwoStreams(nn.Module):
    """Two floating-point tensors, of which the first layers leave the second one alone."""

    def __init__(self, uses_second: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.uses_second = uses_second

    def forward(self, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        first, second = hidden
        mixed = torch.tanh(self.linear(first))
        return (mixed, second * mixed) if self.uses_second else (mixed, second)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_tensor_that_only_passes_through(window):
    plan = GradientFlowPlan.n_wise(window=window, stage_bounds=[0, 1, 2, 4], head_weight=WEIGHT)
    layers = [TwoStreams(False), TwoStreams(True), TwoStreams(True), MaskedHead()]
    net = InProcessPipeline(layers, F.cross_entropy, plan, lambda head: MaskedHead())
    batch = [((inputs, torch.randn(4, WIDTH)), labels) for inputs, labels in make_batch(2)]
    assert_gradients_are_truncated(net, F.cross_entropy, batch)


class Recomputed(nn.Module):
    """A layer that keeps no activations."""

    def __init__(self, layer: nn.Module, *, use_reentrant: bool = False) -> None:
        super().__init__()
        self.layer, self.use_reentrant = layer, use_reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(self.layer, hidden, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("window", [1.5, 2, 3, 4])
def test_activation_checkpointing_with_several_passes(window):
    plan = GradientFlowPlan.n_wise(window=window, stage_bounds=uneven_bounds(4), head_weight=WEIGHT)
    layers = [Recomputed(layer) for layer in make_layers(plan.num_layers)]
    net = InProcessPipeline(layers, F.cross_entropy, plan, make_head)
    assert_gradients_are_truncated(net, F.cross_entropy, make_batch(3))


def test_re_entrant_checkpoints_in_layers():
    batch, layers = make_batch(3), make_layers(6)

    def gradients(window: int, use_reentrant: bool) -> list[Tensor]:
        plan = GradientFlowPlan.n_wise(window=window, stage_bounds=[0, 2, 4, 6], head_weight=WEIGHT)
        every = [Recomputed(layer, use_reentrant=use_reentrant) for layer in layers]
        every[::2] = layers[::2]  # what is recomputed must have an input with a gradient
        net = InProcessPipeline(every, F.cross_entropy, plan, make_head)
        net.zero_grad()
        net.accumulate_gradients(batch)
        return [p.grad for p in net.parameters()]

    for window in (1, 3):
        torch.testing.assert_close(gradients(window, True), gradients(window, False), rtol=0, atol=0)
    says = r"one of the layers \d to \d \(stage [12]\) calls torch.utils.checkpoint with use_reentrant=True"
    with pytest.raises(ConfigError, match=says):
        gradients(2, True)


@pytest.mark.parametrize(
    "frozen", [[0], [0, 1], [2, 3], [4, 5, 6], [0, 1, 2, 3], [8]], ids=lambda numbers: f"layers {numbers}"
)
@pytest.mark.parametrize("window", [1, 1.5, 2, 4])
def test_frozen_layers(window, frozen):
    plan = GradientFlowPlan.n_wise(window=window, stage_bounds=[0, 2, 4, 7, 9], head_weight=WEIGHT)
    layers = make_layers(9)
    for number in frozen:
        layers[number].requires_grad_(False)
    net = InProcessPipeline(layers, F.cross_entropy, plan, make_head)
    assert_gradients_are_truncated(net, F.cross_entropy, make_batch(3))


@pytest.mark.parametrize("window", [1, 1.5, 2, 4])
def test_layers_that_are_frozen_and_unfrozen_between_batches(window):
    plan = GradientFlowPlan.n_wise(window=window, stage_bounds=[0, 2, 4, 7, 9], head_weight=WEIGHT)
    layers = make_layers(9)
    layers[0].requires_grad_(False)
    net = InProcessPipeline(layers, F.cross_entropy, plan, make_head)
    layers[0].requires_grad_(True)
    for number in (1, 2, 3):  # a part of a stage, and all of one
        layers[number].requires_grad_(False)
    assert_gradients_are_truncated(net, F.cross_entropy, make_batch(3))


@pytest.mark.parametrize("window", [1, 1.5, 2, 4])
def test_the_number_of_micro_batches_changes_nothing(window):
    plan = GradientFlowPlan.n_wise(window=window, stage_bounds=uneven_bounds(4), head_weight=WEIGHT)
    net = InProcessPipeline(make_layers(plan.num_layers), F.cross_entropy, plan, make_head)
    inputs, labels = make_batch(1, size=12)[0]

    def gradients(num: int) -> tuple[list[Tensor], dict[int, Tensor]]:
        net.zero_grad()
        batch = list(zip(inputs.chunk(num), labels.chunk(num), strict=True))
        assert len(batch) == num
        losses = net.accumulate_gradients(batch)
        return [p.grad.clone() for p in net.parameters()], losses

    one, one_losses = gradients(1)
    for num in (2, 6, 12):
        many, many_losses = gradients(num)
        torch.testing.assert_close(many, one, rtol=0, atol=1e-14)
        torch.testing.assert_close(many_losses, one_losses, rtol=0, atol=1e-14)


def test_gradients_add_up_until_they_are_cleared():
    plan = GradientFlowPlan.n_wise(window=2, stage_bounds=uneven_bounds(3), head_weight=WEIGHT)
    net = InProcessPipeline(make_layers(plan.num_layers), F.cross_entropy, plan, make_head)
    batch = make_batch(2)
    net.accumulate_gradients(batch)
    once = [p.grad.clone() for p in net.parameters()]
    net.accumulate_gradients(batch)
    torch.testing.assert_close([p.grad for p in net.parameters()], [2 * g for g in once])


# Evaluation, memory, seeds, bad input.


def test_evaluation_gives_every_loss_and_leaves_no_gradient():
    plan = GradientFlowPlan.n_wise(window=1.5, stage_bounds=uneven_bounds(4), head_weight=WEIGHT)
    layers = [nn.Sequential(layer, nn.Dropout(0.5)) for layer in make_layers(plan.num_layers)]
    net = InProcessPipeline(layers, F.cross_entropy, plan, make_head)
    batch = make_batch(3)
    losses = net.evaluate(batch)
    assert losses.keys() == set(range(len(plan.heads)))
    assert all(parameter.grad is None for parameter in net.parameters())
    net.eval()
    for index, head in enumerate(plan.heads):
        expected = 0.0
        for hidden, labels in batch:
            for layer in layers[: head.after_layer]:
                hidden = layer(hidden)
            outputs = net.heads[str(index)](hidden) if index != plan.final else hidden
            expected += F.cross_entropy(outputs, labels).item() / len(batch)
        assert losses[index].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_no_stage_holds_more_micro_batches_than_the_plan_says(window):
    plan = GradientFlowPlan.n_wise(4, window)
    net = InProcessPipeline(make_layers(4), F.cross_entropy, plan, make_head)
    most = [0] * 4
    for stage, work in enumerate(net.stages):

        def watched(*args: Any, stage: int = stage, feed: Any = work.feed) -> None:
            feed(*args)
            most[stage] = max(most[stage], len(net.stages[stage]._in_flight))

        work.feed = watched  # type: ignore[method-assign]
    net.accumulate_gradients(make_batch(7))
    assert most == [plan.in_flight(stage) for stage in range(4)]
    assert [len(work._in_flight) for work in net.stages] == [0] * 4


def test_a_head_starts_the_same_however_many_others_are_built():
    few = InProcessPipeline(make_layers(4), F.cross_entropy, GradientFlowPlan.n_wise(4, 3), make_head)
    many = InProcessPipeline(make_layers(4), F.cross_entropy, GradientFlowPlan.n_wise(4, 1), make_head)
    assert torch.equal(few.heads["0"].weight, many.heads["0"].weight)
    assert not torch.equal(many.heads["0"].weight, many.heads["1"].weight)


def test_building_heads_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    InProcessPipeline([nn.Identity(), nn.Identity()], F.cross_entropy, GradientFlowPlan.local(2), make_head)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.bad_input
def test_bad_input():
    local = GradientFlowPlan.local(3)
    with pytest.raises(ConfigError, match="the plan is for 3 layers, got 4"):
        InProcessPipeline(make_layers(4), F.cross_entropy, local, make_head)
    with pytest.raises(ConfigError, match="auxiliary losses: pass head="):
        InProcessPipeline(make_layers(3), F.cross_entropy, local)
    with pytest.raises(ConfigError, match=r"returned str: expected a torch\.nn\.Module"):
        InProcessPipeline(make_layers(3), F.cross_entropy, local, lambda head: "linear")


@pytest.mark.bad_input
def test_a_head_whose_output_does_not_fit_the_loss():
    def too_narrow(head: LossHead) -> nn.Module:
        return nn.Linear(WIDTH, 1)

    labels = torch.full((4,), NUM_CLASSES - 1)
    batch = [(torch.randn(4, WIDTH), labels)]
    net = InProcessPipeline(make_layers(3), F.cross_entropy, GradientFlowPlan.local(3), too_narrow)
    says = r"head after layer 1 \(stage 0\).*shape \(4, 5\).*labels of shape \(4,\)"
    with pytest.raises(ConfigError, match=says):
        net.accumulate_gradients(batch)
    wide = InProcessPipeline(make_layers(3), lambda outputs, labels: outputs, GradientFlowPlan.end_to_end(3))
    with pytest.raises(ConfigError, match=r"final loss \(stage 2\) gave \(4, 3\): expected one number"):
        wide.accumulate_gradients(batch)


def test_a_device_without_memory_left_is_not_the_fault_of_a_head():
    def allocate(outputs: Tensor, labels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    net = InProcessPipeline(make_layers(3), allocate, GradientFlowPlan.end_to_end(3))
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        net.accumulate_gradients(make_batch(1))
