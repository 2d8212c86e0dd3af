"""ResNets: what their layers compute, what they start from, and that stages of them learn."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_interlock import ConfigError, GradientFlowPlan, InProcessPipeline, LossHead
from ds_interlock.models.resnet import (
    BasicBlock,
    BatchNorm,
    Classifier,
    ResNetConfig,
    ZeroPaddedShortcut,
    build_resnet,
    classification_loss,
    resnet_heads,
    resnet_layers,
)

SMALL = ResNetConfig(depth=8, num_classes=4, in_channels=1, width=4, seed=5)
BOTTLENECK = ResNetConfig(depth=20, num_classes=4, in_channels=3, width=4, block="bottleneck", shortcut="B")


def with_options(config: ResNetConfig, **changes: Any) -> ResNetConfig:
    return ResNetConfig(**{**vars(config), **changes})


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_sizes_are_those_of_the_paper(depth: int, millions: float):
    config = ResNetConfig(depth=depth)
    model = build_resnet(config)
    assert num_parameters(model) / 1e6 == pytest.approx(millions, rel=0.02)
    weighted = [part for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth
    assert len(model) == config.num_layers == (depth - 2) // 2 + 2


@pytest.mark.parametrize("config", [SMALL, BOTTLENECK, with_options(BOTTLENECK, shortcut="A")])
@pytest.mark.parametrize("size", [28, 32])
def test_every_layer_has_the_shape_it_announces(config: ResNetConfig, size: int):
    model = build_resnet(config)
    hidden = torch.rand(2, config.in_channels, size, size)
    expansion = 4 if config.block == "bottleneck" else 1
    for number, layer in enumerate(model[:-1]):
        hidden = layer(hidden)
        group = max(0, number - 1) // config.blocks_per_group
        channels = config.width * 2**group * (expansion if number else 1)
        assert hidden.shape == (2, channels, size >> group, size >> group)
        assert config.channels_after(number + 1) == channels
    assert model[-1](hidden).shape == (2, config.num_classes)


def test_a_bottleneck_model_has_its_depth():
    model = build_resnet(with_options(BOTTLENECK, shortcut="A", depth=29))
    assert sum(isinstance(part, nn.Conv2d | nn.Linear) for part in model.modules()) == 29


def test_shortcut_a_takes_every_second_pixel_and_pads_with_zeros():
    hidden = torch.rand(2, 3, 7, 7)
    out = ZeroPaddedShortcut(stride=2, extra_channels=3)(hidden)
    assert out.shape == (2, 6, 4, 4)
    assert torch.equal(out[:, :3, 1, 3], hidden[:, :, 2, 6])
    assert not out[:, 3:].any()


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_block_adds_to_its_shortcut(shortcut: Any):
    block = BasicBlock(4, 8, stride=2, shortcut=shortcut, seed=1).eval()
    nn.init.zeros_(block.norm_2.weight)
    hidden = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(hidden), F.relu(block.shortcut(hidden)))
    assert num_parameters(block.shortcut) == (0 if shortcut == "A" else 4 * 8 + 2 * 8)


def test_a_block_of_one_shape_adds_its_input():
    block = BasicBlock(4, 4, stride=1, shortcut="B", seed=1).eval()
    nn.init.zeros_(block.norm_2.weight)
    hidden = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(hidden), F.relu(hidden))


def test_images_may_come_as_bytes():
    model = build_resnet(SMALL).eval()
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(model(images), model(images.float()))


@pytest.mark.parametrize("momentum", [0.1, None], ids=["forgets", "mean of all"])
def test_batch_norm_is_pytorchs(momentum: float | None):
    torch.manual_seed(1)
    own, theirs = BatchNorm(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    untrained = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(own.eval()(untrained), theirs.eval()(untrained), rtol=0, atol=0)
    own.train()
    theirs.train()
    for images in torch.randn(4, 2, 3, 5, 5):
        torch.testing.assert_close(own(images), theirs(images), rtol=0, atol=0)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor), name
    torch.testing.assert_close(own.eval()(images), theirs.eval()(images), rtol=0, atol=0)


def test_half_precision_keeps_statistics_in_float32():
    """As DeepSpeed makes it: parameters in bf16, buffers as they were."""
    model = build_resnet(SMALL)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    logits = model(images)
    assert logits.dtype is torch.bfloat16
    loss = classification_loss(logits, labels)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    whole = build_resnet(SMALL)
    whole(images)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, whole.get_buffer(name), rtol=0.05, atol=0.01)


def test_weights_do_not_depend_on_what_was_built_before():
    torch.manual_seed(1)
    whole = build_resnet(BOTTLENECK)
    torch.manual_seed(2)
    for number in (0, 3, len(whole) - 1):
        alone = resnet_layers(BOTTLENECK)[number].build()
        for name, parameter in alone.named_parameters():
            assert torch.equal(parameter, whole[number].get_parameter(name)), f"{number}.{name}"


def test_no_two_layers_and_no_two_seeds_start_alike():
    weights = [
        layer.convolution_2.weight
        for seed in (5, 6)
        for layer in build_resnet(with_options(SMALL, depth=20, seed=seed))[1:4]
    ]
    for number, weight in enumerate(weights):
        assert all(not torch.equal(weight, later) for later in weights[number + 1 :])


def test_initial_weights_are_he_et_als():
    model = build_resnet(ResNetConfig(depth=20, num_classes=100))
    assert model[-2].convolution_2.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert model[-1].linear.weight.std().item() == pytest.approx(math.sqrt(1 / 64), rel=0.03)
    assert not model[-1].linear.bias.any()


def test_layers_can_be_built_without_memory():
    with torch.device("meta"):
        model = build_resnet(BOTTLENECK)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_heads_fit_wherever_a_plan_may_put_them():
    images = torch.rand(3, 3, 8, 8)
    model = build_resnet(BOTTLENECK)
    for channels in ((128, 64), (5,), ()):
        make_head = resnet_heads(BOTTLENECK, channels)
        hidden = images
        for after_layer, layer in enumerate(model[:-1], start=1):
            hidden = layer(hidden)
            head = make_head(LossHead(stage=0, after_layer=after_layer))
            assert head(hidden).shape == (3, 4)
            convolutions = [part for part in head.modules() if isinstance(part, nn.Conv2d)]
            assert [part.out_channels for part in convolutions] == list(channels)
            assert sum(isinstance(part, nn.BatchNorm2d) for part in head.modules()) == len(channels)


def test_a_head_may_average_its_input_to_fewer_rows_and_columns():
    head = resnet_heads(SMALL, (5,), size=2)(LossHead(stage=0, after_layer=2))
    hidden = torch.rand(3, SMALL.width, 8, 8)
    means = hidden.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean(dim=(3, 5))
    assert torch.allclose(head(hidden), head(means))  # which has no more than two


@pytest.mark.bad_input
def test_a_head_behind_the_classifier_is_refused():
    with pytest.raises(ConfigError, match=r"no hidden state after layer 5 of a ResNet-8: expected 1 .* to 4"):
        resnet_heads(SMALL)(LossHead(stage=0, after_layer=5))


@pytest.mark.bad_input
def test_a_head_without_channels_is_refused():
    with pytest.raises(ConfigError, match=r"\[8, 0\] channels"):
        resnet_heads(SMALL, (8, 0))
    with pytest.raises(ConfigError, match="has size 0: expected at least 1"):
        resnet_heads(SMALL, size=0)


@pytest.mark.bad_input
def test_impossible_configurations_name_every_fault():
    with pytest.raises(ConfigError, match="4 faults") as error:
        ResNetConfig(depth=21, width=0, in_channels=0, shortcut="C")  # type: ignore[arg-type]
    for fault in ("width is 0", "in_channels is 0", "shortcut is 'C'", "depth is 21: expected 6n + 2"):
        assert fault in str(error.value)
    with pytest.raises(ConfigError, match=r"depth is 28: expected 9n \+ 2"):
        ResNetConfig(depth=28, block="bottleneck")
    with pytest.raises(ConfigError, match="block is 'dense'"):
        ResNetConfig(block="dense")  # type: ignore[arg-type]


# As stages of a pipeline, in one process.

BOUNDS = [0, 2, 3, 4, 5]  # stem and block, a block each, the classifier


def make_pipeline(plan: GradientFlowPlan, config: ResNetConfig = SMALL) -> InProcessPipeline:
    return InProcessPipeline(build_resnet(config), F.cross_entropy, plan, resnet_heads(config, (6,)))


def patterns(num_images: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Four fixed patterns of 8 x 8 pixels under noise, and which one it is."""
    generator = torch.Generator().manual_seed(3)
    templates = torch.randn(4, 1, 8, 8, generator=generator)
    labels = torch.arange(num_images) % 4
    return templates[labels] + noise * torch.randn(num_images, 1, 8, 8, generator=generator), labels


def test_stages_have_the_gradients_and_statistics_of_the_whole_model():
    torch.set_default_dtype(torch.float64)
    try:
        plan = GradientFlowPlan.n_wise(window=4, stage_bounds=BOUNDS)
        images, labels = (part.split(4) for part in patterns(8))
        pipeline, model = make_pipeline(plan), build_resnet(SMALL)
        pipeline.accumulate_gradients(list(zip(images, labels, strict=True)))
        for some, of_some in zip(images, labels, strict=True):
            (F.cross_entropy(model(some), of_some) / 2).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(pipeline.get_parameter(name).grad, parameter.grad, rtol=0, atol=1e-10)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(pipeline.get_buffer(name), buffer, rtol=0, atol=1e-12)


def test_evaluation_uses_running_statistics_and_leaves_them():
    plan = GradientFlowPlan.local(stage_bounds=BOUNDS)
    pipeline = make_pipeline(plan)
    images, labels = patterns(16)
    before = running_statistics(pipeline)
    pipeline.accumulate_gradients([(images, labels)])
    trained = running_statistics(pipeline)
    assert all(not torch.equal(trained[name], before[name]) for name in before)
    assert any(name.startswith("heads.") for name in before)

    whole = pipeline.evaluate([(images, labels)])
    assert all(torch.equal(buffer, trained[name]) for name, buffer in pipeline.named_buffers())
    # Every image is normalised alike, whatever else is in its micro-batch.
    split = pipeline.evaluate(list(zip(images.split(4), labels.split(4), strict=True)))
    for loss, value in whole.items():
        torch.testing.assert_close(split[loss], value)


@pytest.mark.parametrize(
    "plan",
    [
        GradientFlowPlan.local(stage_bounds=BOUNDS),
        GradientFlowPlan.n_wise(window=1.5, stage_bounds=[0, 1, 3, 5]),
    ],
    ids=["local", "interlock 1.5"],
)
def test_stages_learn_to_tell_patterns_apart(plan: GradientFlowPlan):
    torch.manual_seed(0)
    pipeline = make_pipeline(plan, with_options(SMALL, width=8))
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1, momentum=0.9)
    images, labels = patterns(64)
    batch = list(zip(images.split(32), labels.split(32), strict=True))
    for _ in range(60):
        optimizer.zero_grad()
        pipeline.accumulate_gradients(batch)
        optimizer.step()
    for loss, value in pipeline.evaluate(batch).items():
        assert value.item() < 0.3 * math.log(4), f"loss {loss}"
    fresh_images, fresh_labels = patterns(128)
    outputs = nn.Sequential(*pipeline.layers_in_order).eval()(fresh_images[64:])
    assert (outputs.argmax(1) != fresh_labels[64:]).float().mean() < 0.1


def test_a_head_starts_the_same_from_the_same_seed():
    heads = []
    for _ in range(2):
        torch.manual_seed(7)
        heads.append(resnet_heads(SMALL, (6,))(LossHead(stage=0, after_layer=2)))
    for one, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert isinstance(heads[0][-1], Classifier)
