"""What each layer of a model costs on one device: the file between measuring and planning.

    ds-interlock profile ... -o profile.json   measures one (``profiling/``)
    ds-interlock plan ... --model NAME         estimates one from sizes (``hf/model/profile.py``)
    ds-interlock plan ... --profile FILE       reads one

All times are for one micro-batch of ``micro_batch_size`` samples.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import inf
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ds_interlock.config import HeadConfig
from ds_interlock.errors import ConfigError
from ds_interlock.files import read_record, replace_text
from ds_interlock.schedule.cost import CostModel

_NO_DEVICE = "none"

_Cut = tuple[float, float, list[int]]
"""Of some first layers into stages: the slowest stage's seconds, the sum of their squares, the bounds."""


def balanced_bounds(seconds: Sequence[float], num_stages: int) -> list[int]:
    """Stage bounds under which the slowest stage is fastest; ties go to the evener cut.

    ConfigError if there are fewer layers than stages.
    """
    num_layers = len(seconds)
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"{num_stages} stages for {num_layers} layers: every stage needs at least one")
    ends = [0.0, *accumulate(seconds)]
    best: dict[int, _Cut] = {0: (0.0, 0.0, [0])}
    for stage in range(1, num_stages + 1):
        best = {stop: _with_stage(best, ends, stop) for stop in range(stage, num_layers + 1)}
    return best[num_layers][2]


def _with_stage(best: dict[int, _Cut], ends: Sequence[float], stop: int) -> _Cut:
    """The best cut of the first ``stop`` layers that adds a stage to one of ``best``."""
    slowest, squares, chosen = inf, inf, -1
    for start in range(stop - 1, -1, -1):
        own = ends[stop] - ends[start]
        if own > slowest:  # and more so with more layers
            break
        if start in best:
            cut = max(best[start][0], own), best[start][1] + own * own
            if cut <= (slowest, squares):
                (slowest, squares), chosen = cut, start
    return slowest, squares, [*best[chosen][2], stop]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LayerProfile(_Record):
    """One layer: seconds of its passes, bytes of what it keeps and sends."""

    name: str
    forward_seconds: float = Field(ge=0)
    input_gradient_seconds: float = Field(ge=0)  # of a relay through this layer
    weight_gradient_seconds: float = Field(ge=0)  # of a backward pass on top of the input gradient
    optimizer_seconds: float = Field(0.0, ge=0)
    num_parameters: int = Field(0, ge=0)
    activation_bytes: float = Field(0.0, ge=0)  # kept until the last backward pass
    output_bytes: float = Field(0.0, ge=0)  # of the hidden state after it


class HeadProfile(_Record):
    """One auxiliary head, forward and backward together, and one of the blocks that some stages add to it."""

    type: str
    seconds: float = Field(ge=0)
    optimizer_seconds: float = Field(0.0, ge=0)
    num_parameters: int = Field(0, ge=0)
    blocks: tuple[int, ...] = (0,)  # by stage, the last number for all stages that follow
    block_seconds: float = Field(0.0, ge=0)  # 0: not profiled
    block_optimizer_seconds: float = Field(0.0, ge=0)
    copy_bytes: float = Field(0.0, ge=0)  # of the unembedding, which a shared readout reads with


class Profile(_Record):
    """A model's layers on one device, and the link between two devices."""

    format: Literal[1] = 1
    model: str
    device: str
    source: str  # "measured", or the assumptions it was estimated under
    dtype: str = "float32"
    micro_batch_size: int = Field(1, ge=1)
    seq_length: int | None = None
    layers: tuple[LayerProfile, ...] = Field(min_length=1)
    head: HeadProfile
    loss_seconds: float = Field(0.0, ge=0)  # of the model's own loss, both passes
    label_bytes: float = Field(0.0, ge=0)
    tied_layers: tuple[int, ...] = ()  # numbers of the layers that share a weight
    latency_seconds: float = Field(0.0, ge=0)
    bandwidth_bytes_per_second: float | None = Field(None, gt=0)  # None: no limit
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Reads a profile, or raises a ConfigError that says what is wrong with the file."""
        return read_record(path, cls, what="profile", hint="make one with `ds-interlock profile`")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile as JSON; an interrupted write leaves an earlier file as it was."""
        replace_text(path, self.model_dump_json(indent=1) + "\n")

    @property
    def is_unit(self) -> bool:
        """True if times are multiples of a stage's forward, and sizes unknown: see ``unit_profile``."""
        return self.device == _NO_DEVICE

    @property
    def layer_seconds(self) -> list[float]:
        """For each layer the time of one micro-batch under ordinary backpropagation."""
        return [
            layer.forward_seconds + layer.input_gradient_seconds + layer.weight_gradient_seconds
            for layer in self.layers
        ]

    def _block_costs(self, heads: HeadConfig) -> tuple[float, float]:
        """Seconds of a head's block, and of its optimizer step; not profiled, they are the middle layer's."""
        if self.head.block_seconds:
            return self.head.block_seconds, self.head.block_optimizer_seconds
        middle = max(0, len(self.layers) // 2 - 1)
        seconds = self.layer_seconds[middle] * heads.sequence_fraction
        return seconds, self.layers[middle].optimizer_seconds

    def balanced_bounds(self, num_stages: int) -> list[int]:
        """Stage bounds under which the slowest stage is fastest; a ConfigError if there are too few layers.

        Layers without weights at the end stay with the last one that has some: they take its outputs,
        not a hidden state that a stage could receive.
        """
        seconds = self.layer_seconds
        with_weights = [number for number, layer in enumerate(self.layers) if layer.num_parameters]
        last = with_weights[-1] if with_weights else len(seconds) - 1
        *bounds, _ = balanced_bounds([*seconds[:last], sum(seconds[last:])], num_stages)
        return [*bounds, len(seconds)]

    def cost_model(self, stage_bounds: Sequence[int], heads: HeadConfig | None = None) -> CostModel:
        """The costs, in seconds, of stages cut at ``stage_bounds``.

        The blocks of auxiliary heads are those of ``heads``, by default those that were profiled.
        """
        last = [self.layers[stop - 1].output_bytes for stop in stage_bounds[1:]]
        stages = [self.layers[start:stop] for start, stop in pairwise(stage_bounds)]
        head, of_heads = self.head, heads or HeadConfig(blocks=self.head.blocks)
        blocks = [of_heads.blocks_at(stage) for stage in range(len(stages))]
        block_seconds, block_optimizer_seconds = self._block_costs(of_heads)
        return CostModel(
            forward=[sum(layer.forward_seconds for layer in stage) for stage in stages],
            input_gradient=[sum(layer.input_gradient_seconds for layer in stage) for stage in stages],
            weight_gradient=[sum(layer.weight_gradient_seconds for layer in stage) for stage in stages],
            optimizer=[sum(layer.optimizer_seconds for layer in stage) for stage in stages],
            layer_weights=[layer.forward_seconds for layer in self.layers],
            head=[head.seconds + number * block_seconds for number in blocks],
            final_head=self.loss_seconds,
            head_optimizer=[head.optimizer_seconds + number * block_optimizer_seconds for number in blocks],
            latency=self.latency_seconds,
            bandwidth=self.bandwidth_bytes_per_second or float("inf"),
            forward_bytes=[size + self.label_bytes for size in last],
            # A gradient has the size of the hidden state that its sender received.
            gradient_bytes=[0.0, *last[:-1]],
        )

    def is_tied_across(self, stage_bounds: Sequence[int]) -> bool:
        """True if stages cut at ``stage_bounds`` share weights."""
        return len({bisect_right(stage_bounds, layer) for layer in self.tied_layers}) > 1

    def activation_bytes(self, stage_bounds: Sequence[int]) -> list[float]:
        """For each stage what one micro-batch in flight keeps, its input included."""
        inputs = [0.0, *(layer.output_bytes for layer in self.layers)]
        return [
            inputs[start] + sum(layer.activation_bytes for layer in self.layers[start:stop])
            for start, stop in pairwise(stage_bounds)
        ]


def unit_profile(num_layers: int, layers_per_stage: float, head_share: float = 0.3) -> Profile:
    """Layers all alike, a stage's forward, input and weight gradient 1 s each, for plans without a model."""
    share = 1.0 / layers_per_stage
    layer = LayerProfile(
        name="layer", forward_seconds=share, input_gradient_seconds=share, weight_gradient_seconds=share
    )
    return Profile(
        model="equal layers",
        device=_NO_DEVICE,
        source=f"a stage's forward, input and weight gradient 1 each, a head {head_share:g}",
        layers=(layer,) * num_layers,
        head=HeadProfile(type="any", seconds=head_share),
    )
