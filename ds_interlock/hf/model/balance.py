"""Stage bounds of equal work."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from ds_interlock.config import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.cut import Block, Blueprint, Front, Logits
from ds_interlock.planning.profile import balanced_bounds


def default_bounds(blueprint: Blueprint, interlock: InterlockConfig, num_stages: int) -> list[int]:
    """Bounds of stages of equal work, counted in matrix parameters.

    A token costs as many products as the matrices have parameters; embeddings are looked up. In modes with
    auxiliary heads every stage has one like the unembedding, on ``token_fraction`` of the tokens, so only the
    last stage's excess over that is counted. ``ds-interlock plan`` is more exact.
    """
    num_blocks = blueprint.skeleton.anatomy.num_blocks
    if num_stages > num_blocks:
        raise ConfigError(
            f"{num_stages} stages for the {num_blocks} blocks of --model: every stage needs at least one; "
            f"use 1 to {num_blocks} processes, or fewer --num_stages with data-parallel replicas"
        )
    head = interlock.head
    in_heads = 0.0 if interlock.is_global else head.token_fraction * head.sequence_fraction
    return balanced_bounds([_work(layer, in_heads) for layer in blueprint.outline], num_stages)


def _work(layer: nn.Module, in_heads: float) -> float:
    if isinstance(layer, Front | Logits):
        return 0.0
    work = float(sum(p.numel() for p in layer.parameters() if p.dim() >= 2))
    return work if isinstance(layer, Block) else work * (1 - in_heads)


def parse_bounds(text: str) -> Sequence[int]:
    """Reads ``--stage_bounds 0,9,18``; ConfigError if it is not a list of numbers."""
    try:
        return [int(bound) for bound in text.split(",")]
    except ValueError:
        raise ConfigError(f"--stage_bounds {text}: expected layer numbers such as 0,9,18,27,33") from None


def describe(blueprint: Blueprint, bounds: Sequence[int]) -> str:
    """The layers of each stage and their millions of parameters, one line per stage."""
    lines = []
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        own = blueprint.outline[start:stop]
        num_blocks = sum(isinstance(layer, Block) for layer in own)
        others = [type(layer).__name__.lower() for layer in own if not isinstance(layer, Block)]
        size = sum(p.numel() for layer in own for p in layer.parameters()) / 1e6
        what = ", ".join([f"{num_blocks} block{'s' * (num_blocks != 1)}", *others])
        lines.append(f"stage {stage}: layers {start} to {stop - 1} ({what}), {size:.4g} M parameters")
    return "\n".join(lines)
