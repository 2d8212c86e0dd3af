"""What layers, heads and losses receive is theirs to change, and changes nothing for anyone else."""

import copy
from typing import Any

import pytest
import torch
from in_place import STAGE_BOUNDS, Network, micro_batches

from ds_interlock import InProcessPipeline, InterlockConfig

MODES: dict[str, dict[str, Any]] = {
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    "window 1.5": {"mode": "interlock", "window": 1.5},
    "window 2": {"mode": "interlock", "window": 2},
    "window 3": {"mode": "interlock", "window": 3},
}
ROWS = pytest.mark.parametrize("rows", [4, 2100])


def pipeline(network: Network, section: dict[str, Any]) -> InProcessPipeline:
    plan = InterlockConfig.from_deepspeed({"interlock": section}).plan(STAGE_BOUNDS)
    return InProcessPipeline(network.layers(), network.loss, plan, network.head)


@ROWS
@pytest.mark.parametrize("mode", MODES)
def test_in_place_is_out_of_place(mode: str, rows: int) -> None:
    results = []
    for in_place in (True, False):
        net = pipeline(Network(in_place), MODES[mode])
        data = micro_batches(3, rows)
        kept = copy.deepcopy(data)
        losses = net.accumulate_gradients(data)
        evaluated = net.evaluate(data)
        assert all(
            torch.equal(a, b)
            for pair, same in zip(data, kept, strict=True)
            for a, b in zip(pair, same, strict=True)
        )
        results.append(
            (losses, evaluated, {n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers()))
        )
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
