"""Layers, heads and losses that change what they receive in place, and batch norm, on four stages."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from in_place import STAGE_BOUNDS, Network, micro_batches
from ranks import RankPool
from torch import Tensor

MODES: dict[str, dict[str, Any] | None] = {
    "DeepSpeed": None,
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    "window 1.5": {"mode": "interlock", "window": 1.5},
    "window 2": {"mode": "interlock", "window": 2},
}
NUM_MICRO_BATCHES = 4


@dataclass(frozen=True)
class Case:
    mode: str
    in_place: bool = True
    checkpointing: bool = False
    rows: int = 4
    """Their labels travel within the frame of a message; those of 2,100 by themselves."""


CASES = [
    *(Case(mode, in_place) for mode in MODES for in_place in (True, False)),
    *(Case(mode, rows=2100) for mode in MODES if mode != "window 1.5"),
    *(Case(mode, in_place=False, rows=2100) for mode in ("local", "window 2")),
    *(Case(mode, checkpointing=True) for mode in MODES if mode != "DeepSpeed"),
]


def train(case: Case) -> dict[str, Tensor]:
    """Two batches; parameters, buffers and the last losses. On a rank."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    import ds_interlock

    section, network = MODES[case.mode], Network(case.in_place)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": case.rows,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "steps_per_print": None,
        "pipeline": {"use_reentrant": False},
    }
    module: dict[str, Any] = {
        "layers": network.layers(),
        "loss_fn": network.loss,
        "num_stages": 4,
        "activation_checkpoint_interval": int(case.checkpointing),
    }
    if section is None:
        net: Any = PipelineModule(**module, partition_method="uniform")
        engine, *_ = deepspeed.initialize(model=net, config=config)
    else:
        config["interlock"] = {"timeout_seconds": 60, **section}
        net = ds_interlock.InterlockPipelineModule(**module, stage_bounds=STAGE_BOUNDS, head=network.head)
        engine, *_ = ds_interlock.initialize(model=net, config=config)
    data = iter(micro_batches(2 * NUM_MICRO_BATCHES, case.rows))
    losses = [engine.train_batch(data) for _ in range(2)]
    state = {name: value.detach().clone() for name, value in net.state_dict().items()}
    state["final loss"] = losses[-1] if section is None else engine.drain()
    engine.destroy()
    return state


def train_all() -> dict[Case, dict[str, Tensor]]:
    """On a rank."""
    return {case: train(case) for case in CASES}


@pytest.fixture(scope="module")
def outcomes(ranks4: RankPool) -> list[dict[Case, dict[str, Tensor]]]:
    return ranks4.run(train_all, within_seconds=240)


def assert_same(outcomes: list[dict[Case, dict[str, Tensor]]], one: Case, other: Case) -> None:
    for of_rank in outcomes:
        torch.testing.assert_close(of_rank[one], of_rank[other], rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_in_place_is_out_of_place(outcomes: Any, mode: str) -> None:
    assert_same(outcomes, Case(mode), Case(mode, in_place=False))


@pytest.mark.parametrize("mode", ["local", "window 2"])
def test_labels_go_downstream_as_they_came(outcomes: Any, mode: str) -> None:
    assert_same(outcomes, Case(mode, rows=2100), Case(mode, in_place=False, rows=2100))


@pytest.mark.parametrize("rows", [4, 2100])
def test_global_is_deepspeed(outcomes: Any, rows: int) -> None:
    assert_same(outcomes, Case("global", rows=rows), Case("DeepSpeed", rows=rows))


@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_recomputation_updates_no_buffer(outcomes: Any, mode: str) -> None:
    """Also with DeepSpeed's key for non-reentrant checkpointing."""
    assert_same(outcomes, Case(mode, checkpointing=True), Case(mode))
    counts = {int(v) for of_rank in outcomes for k, v in of_rank[Case(mode)].items() if "num_batches" in k}
    assert counts == {2 * NUM_MICRO_BATCHES}
