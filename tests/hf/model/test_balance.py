"""Stages of equal work: counted in matrix parameters, and what heads do anyway is not counted twice."""

from pathlib import Path
from typing import Any

import pytest
from families import save_tiny

from ds_interlock.config import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.balance import default_bounds, describe, parse_bounds
from ds_interlock.hf.model.cut import Blueprint
from ds_interlock.hf.model.pretrained import open_pretrained


def blueprint(folder: Path, **sizes: Any) -> Blueprint:
    save_tiny("llama", folder, **sizes)
    return open_pretrained(str(folder)).blueprint()


def interlock(**section: Any) -> InterlockConfig:
    return InterlockConfig.from_deepspeed({"interlock": section})


def test_a_heavy_unembedding_is_worth_blocks_unless_every_stage_has_a_head(tmp_path: Path) -> None:
    # A block has 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 matrix parameters, the unembedding 131 * 32.
    small = blueprint(tmp_path, num_hidden_layers=4, intermediate_size=16)
    assert default_bounds(small, interlock(mode="global"), 2) == [0, 3, 7]
    light = interlock(mode="local", head={"token_fraction": 1.0})
    assert default_bounds(small, light, 2) == [0, 3, 7]
    eight = blueprint(tmp_path / "eight", num_hidden_layers=8, intermediate_size=8)
    in_global = default_bounds(eight, interlock(mode="global"), 2)
    in_local = default_bounds(eight, light, 2)
    assert in_local == [0, 5, 11]
    assert in_global[1] > in_local[1]
    some = interlock(mode="local", head={"token_fraction": 0.5})
    assert in_local[1] <= default_bounds(eight, some, 2)[1] <= in_global[1]


@pytest.mark.bad_input
def test_every_stage_needs_a_block(tmp_path: Path) -> None:
    net = blueprint(tmp_path)
    with pytest.raises(ConfigError, match="5 stages for the 4 blocks of --model"):
        default_bounds(net, interlock(mode="local"), 5)


def test_bounds_are_read_and_told(tmp_path: Path) -> None:
    bounds = parse_bounds("0,2,7")
    assert bounds == [0, 2, 7]
    lines = describe(blueprint(tmp_path), bounds).splitlines()
    assert lines[0].startswith("stage 0: layers 0 to 1 (1 block, front), 0.01")
    assert lines[1].startswith("stage 1: layers 2 to 6 (3 blocks, end, unembedding), 0.0")
    with pytest.raises(ConfigError, match="--stage_bounds 0;7: expected layer numbers"):
        parse_bounds("0;7")
