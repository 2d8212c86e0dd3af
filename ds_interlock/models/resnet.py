"""ResNets for small images, as a list of layers for ``PipelineModule``, and auxiliary heads for them.

Each line is one layer, hence one place where the pipeline can be cut:

    layer 0            Stem             images_bchw -> hidden_bchw     3x3 convolution, batch norm, ReLU
    layers 1..n        a block each     width,     all rows and columns
    layers n+1..2n     a block each     2 * width, half of them (the first block has stride 2)
    layers 2n+1..3n    a block each     4 * width, a quarter
    last               Classifier       hidden_bchw -> logits_bv       global average pooling, linear

    BasicBlock         3x3, 3x3         depth 6n + 2: ResNet-20, 32, 56, 110
    BottleneckBlock    1x1, 3x3, 1x1    depth 9n + 2: ResNet-29, 164; its output is 4 times as wide

Batch norm is local to the micro-batch: with more micro-batches per batch the numbers differ. Its running
statistics are buffers, of which each data-parallel replica has its own.

Shape suffixes: b micro-batch, c channel, h row, w column, v class.

Sources: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2016, section 4.2 (the model)
and section 3.3 (shortcuts A and B); He, Zhang, Ren, Sun: Delving Deep into Rectifiers, 2015 (initial
weights); Gomez, Key, Perlin, Gou, Frosst, Dean, Gal: Interlocking Backpropagation, 2022 (heads).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_interlock.errors import ConfigError, list_faults
from ds_interlock.schedule.plan import LossHead

Block = Literal["basic", "bottleneck"]
Shortcut = Literal["A", "B"]

HEAD_CHANNELS, HEAD_SIZE = (64, 64), 7
"""Of an auxiliary head: channels of its convolutions, four times the usual width as in the experiment
``resnet``, and the size of what they read. The paper's code has 128 and 64 channels, and averages nothing."""

_NUM_GROUPS = 3
_CONVOLUTIONS = {"basic": 2, "bottleneck": 3}
_EXPANSION = {"basic": 1, "bottleneck": 4}
_MAX_LAYERS = 2**16  # keeps the seeds of two runs apart: no layer of one starts as a layer of the other


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes and options of a ResNet.

    Attributes:
        depth: Weighted layers from the first convolution to the classifier: 6n + 2 with basic blocks,
            9n + 2 with bottleneck blocks, with n blocks in a group.
        num_classes: Number of outputs.
        in_channels: Channels of the images: 1 for grey, 3 for colours.
        width: Channels of the stem and of the first group's 3x3 convolutions.
        block: What a group is made of.
        shortcut: What adds a block's input to its output where their shapes differ. "A": every second
            pixel, and zeros for the new channels. "B": a 1x1 convolution and batch norm.
        seed: A layer draws its initial weights from this and its number, so that they are the same however
            the layers are cut into stages.

    Raises:
        ConfigError: Listing every value that is impossible.
    """

    depth: int = 20
    num_classes: int = 10
    in_channels: int = 3
    width: int = 16
    block: Block = "basic"
    shortcut: Shortcut = "A"
    seed: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}: expected at least 1"
            for name in ("num_classes", "in_channels", "width")
            if getattr(self, name) < 1
        ]
        for name, choices in (("block", _CONVOLUTIONS), ("shortcut", "AB")):
            if getattr(self, name) not in tuple(choices):
                faults.append(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}")
        if self.block in _CONVOLUTIONS:
            step = _NUM_GROUPS * _CONVOLUTIONS[self.block]
            if self.depth < step + 2 or (self.depth - 2) % step:
                faults.append(
                    f"depth is {self.depth}: expected {step}n + 2 with {self.block} blocks, as "
                    f"{step + 2}, {2 * step + 2} or {3 * step + 2}"
                )
        if faults:
            raise ConfigError(list_faults("ResNet", faults))

    @property
    def blocks_per_group(self) -> int:
        """Number of blocks in each of the three groups."""
        return (self.depth - 2) // (_NUM_GROUPS * _CONVOLUTIONS[self.block])

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the whole model."""
        return _NUM_GROUPS * self.blocks_per_group

    @property
    def num_layers(self) -> int:
        """Number of layers of ``resnet_layers``: the blocks, stem, classifier."""
        return self.num_blocks + 2

    def channels_after(self, num_layers: int) -> int:
        """Channels of the hidden state after the first ``num_layers`` layers, the stem being the first."""
        if not 1 <= num_layers <= self.num_blocks + 1:
            raise ConfigError(
                f"there is no hidden state after layer {num_layers} of a ResNet-{self.depth}: expected 1 "
                f"(after the stem) to {self.num_blocks + 1} (before the classifier)"
            )
        group = (num_layers - 2) // self.blocks_per_group
        return self.width if num_layers == 1 else int(self.width * 2**group * _EXPANSION[self.block])


def resnet_layers(config: ResNetConfig) -> list[LayerSpec]:
    """The model as layer specifications; see the picture at the top of the file."""
    seeds = [config.seed * _MAX_LAYERS + layer for layer in range(config.num_layers)]
    block = BasicBlock if config.block == "basic" else BottleneckBlock
    layers = [LayerSpec(Stem, config.in_channels, config.width, seed=seeds[0])]
    for number in range(1, config.num_blocks + 1):
        group, index = divmod(number - 1, config.blocks_per_group)
        options = {"stride": 2 if group > 0 and index == 0 else 1, "shortcut": config.shortcut}
        sizes = (config.channels_after(number), config.width * 2**group)
        layers.append(LayerSpec(block, *sizes, **options, seed=seeds[number]))
    last_width = config.channels_after(config.num_blocks + 1)
    return [*layers, LayerSpec(Classifier, last_width, config.num_classes, seed=seeds[-1])]


def build_resnet(config: ResNetConfig) -> nn.Sequential:
    """The whole model in one process, with the weights that the pipeline starts from.

    Parameter names are those of ``PipelineModule``: ``3.convolution_1.weight``.
    """
    return nn.Sequential(*(spec.build() for spec in resnet_layers(config)))


def resnet_heads(
    config: ResNetConfig, channels: Sequence[int] = HEAD_CHANNELS, size: int | None = HEAD_SIZE
) -> Callable[[LossHead], nn.Module]:
    """Auxiliary heads for ``InterlockPipelineModule(head=...)`` and ``InProcessPipeline(head=...)``.

    Args:
        config: The model they are for.
        channels: Of each 3x3 convolution of a head, which batch norm and ReLU follow. Without any, a head
            is a classifier like the model's own.
        size: Rows and columns that a head averages its input to first, where it has more: convolutions
            of the large images of early layers then cost little. None averages nothing.

    Returns:
        A function from a head position to a new head, with weights from the global generator.

    Raises:
        ConfigError: If a convolution has no channels, or ``size`` is below 1; from the function, if the
            position has no images.
    """
    if size is not None and size < 1:
        raise ConfigError(f"the hidden state that a head reads has size {size}: expected at least 1")
    if any(number < 1 for number in channels):
        raise ConfigError(f"convolutions of a head have {list(channels)} channels: expected at least 1 each")

    def make_head(head: LossHead) -> nn.Module:
        sizes = (config.channels_after(head.after_layer), *channels)
        convolutions = [_ConvolutionHead(*pair) for pair in zip(sizes, sizes[1:], strict=False)]
        smaller = [] if size is None else [_Smaller(size)]
        return nn.Sequential(*smaller, *convolutions, Classifier(sizes[-1], config.num_classes))

    return make_head


def classification_loss(logits_bv: Tensor, labels_b: Tensor) -> Tensor:
    """Mean cross-entropy in float32 at least, of int64 labels: for ``PipelineModule(loss_fn=...)``."""
    return F.cross_entropy(logits_bv.to(torch.promote_types(logits_bv.dtype, torch.float32)), labels_b)


class Stem(nn.Module):
    """images_bchw, of any type -> hidden_bchw, of the weights' type."""

    def __init__(self, in_channels: int, width: int, *, seed: int) -> None:
        super().__init__()
        self.convolution = _convolution(in_channels, width)
        self.norm = BatchNorm(width)
        _initialise(self, seed)

    def forward(self, images_bchw: Tensor) -> Tensor:
        return F.relu(self.norm(self.convolution(images_bchw.to(self.convolution.weight.dtype))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions of ``width`` channels, a shortcut around them: hidden_bchw -> hidden_bchw."""

    def __init__(self, in_channels: int, width: int, *, stride: int, shortcut: Shortcut, seed: int) -> None:
        super().__init__()
        self.convolution_1 = _convolution(in_channels, width, stride=stride)
        self.norm_1 = BatchNorm(width)
        self.convolution_2 = _convolution(width, width)
        self.norm_2 = BatchNorm(width)
        self.shortcut = _make_shortcut(in_channels, width, stride, shortcut)
        _initialise(self, seed)

    def forward(self, hidden_bchw: Tensor) -> Tensor:
        inner_bchw = F.relu(self.norm_1(self.convolution_1(hidden_bchw)))
        inner_bchw = self.norm_2(self.convolution_2(inner_bchw))
        return F.relu(inner_bchw + self.shortcut(hidden_bchw))


class BottleneckBlock(nn.Module):
    """A 3x3 convolution between two 1x1, a shortcut around them; the output has ``4 * width`` channels."""

    def __init__(self, in_channels: int, width: int, *, stride: int, shortcut: Shortcut, seed: int) -> None:
        super().__init__()
        out_channels = _EXPANSION["bottleneck"] * width
        self.convolution_1 = _convolution(in_channels, width, size=1)
        self.norm_1 = BatchNorm(width)
        self.convolution_2 = _convolution(width, width, stride=stride)
        self.norm_2 = BatchNorm(width)
        self.convolution_3 = _convolution(width, out_channels, size=1)
        self.norm_3 = BatchNorm(out_channels)
        self.shortcut = _make_shortcut(in_channels, out_channels, stride, shortcut)
        _initialise(self, seed)

    def forward(self, hidden_bchw: Tensor) -> Tensor:
        inner_bchw = F.relu(self.norm_1(self.convolution_1(hidden_bchw)))
        inner_bchw = F.relu(self.norm_2(self.convolution_2(inner_bchw)))
        inner_bchw = self.norm_3(self.convolution_3(inner_bchw))
        return F.relu(inner_bchw + self.shortcut(hidden_bchw))


class ZeroPaddedShortcut(nn.Module):
    """Option A: pixels at distance ``stride``, and ``extra_channels`` of zeros after the others."""

    def __init__(self, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = extra_channels

    def forward(self, hidden_bchw: Tensor) -> Tensor:
        kept_bchw = hidden_bchw[:, :, :: self.stride, :: self.stride]
        return F.pad(kept_bchw, (0, 0, 0, 0, 0, self.extra_channels))


class Classifier(nn.Module):
    """hidden_bchw -> logits_bv. Without a seed the weights come from the global generator."""

    def __init__(self, in_channels: int, num_classes: int, *, seed: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, num_classes)
        _initialise(self, seed)

    def forward(self, hidden_bchw: Tensor) -> Tensor:
        return cast(Tensor, self.linear(hidden_bchw.mean(dim=(2, 3))))


class _Smaller(nn.Module):
    """Averages hidden_bchw to at most ``size`` rows and columns."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden_bchw: Tensor) -> Tensor:
        rows, columns = (min(self.size, number) for number in hidden_bchw.shape[2:])
        return F.adaptive_avg_pool2d(hidden_bchw, (rows, columns))


class _ConvolutionHead(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(_convolution(in_channels, out_channels), BatchNorm(out_channels), nn.ReLU())
        _initialise(self, seed=None)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose weights may be of lower precision than its running statistics.

    DeepSpeed's bf16 leaves buffers in float32, and torch takes weights of their type only.
    """

    def forward(self, hidden_bchw: Tensor) -> Tensor:
        mean, variance = cast(Tensor, self.running_mean), self.running_var
        count, share = cast(Tensor, self.num_batches_tracked), self.momentum
        if self.training:
            count.add_(1)
        if share is None:  # as in torch's update_bn: the running statistics are the mean over all batches
            share = 1 / count.item() if self.training else 0.0
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(hidden_bchw, mean, variance, weight, bias, self.training, share, self.eps)


def _convolution(in_channels: int, out_channels: int, *, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Keeps rows and columns but for the stride. The bias is that of the batch norm after it."""
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)


def _make_shortcut(in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if shortcut == "A":
        return ZeroPaddedShortcut(stride, out_channels - in_channels)
    projection = _convolution(in_channels, out_channels, size=1, stride=stride)
    return nn.Sequential(projection, BatchNorm(out_channels))


def _initialise(module: nn.Module, seed: int | None) -> None:
    """He et al.'s normal weights for convolutions, variance 1 / inputs for linear layers, biases 0."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for part in module.modules():
        if not isinstance(part, nn.Conv2d | nn.Linear) or part.weight.is_meta:
            continue  # batch norm keeps PyTorch's ones and zeros; on meta, only shapes are looked at
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        else:
            nn.init.kaiming_normal_(part.weight, nonlinearity="linear", generator=generator)
            nn.init.zeros_(part.bias)
