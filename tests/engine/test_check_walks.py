"""``engine.check_walks`` refuses kernels that overwrite what they saved where a plan walks back twice."""

from typing import Any

import pytest
import torch
from overwriting_kernels import WIDTH, KernelLayer, ScalesWhatItSaved
from ranks import RankPool
from torch import nn

MODES: dict[str, dict[str, Any]] = {
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    "window 1.5": {"mode": "interlock", "window": 1.5},
    "window 2": {"mode": "interlock", "window": 2},
    "schedule": {"schedule": [{"from_step": 0, "window": 1}, {"from_step": 9, "window": 2}]},
}
KERNEL_LAYER = 5  # the second one of stage 2


def run(mode: str, *, kernel: str = "", check: bool = True, checkpointing: bool = False) -> Any:
    """A batch on four stages: the state after it, or what the check says of a kernel. On a rank."""
    import ds_interlock
    from ds_interlock.errors import ConfigError

    torch.manual_seed(1)
    net = ds_interlock.InterlockPipelineModule(
        [KernelLayer(kernel if number == KERNEL_LAYER else "") for number in range(8)],
        loss_fn=nn.functional.mse_loss,
        num_stages=4,
        partition_method="uniform",
        activation_checkpoint_interval=int(checkpointing),
        head=lambda place: KernelLayer(),
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "steps_per_print": None,
        "interlock": {"timeout_seconds": 60, **MODES[mode]},
    }
    engine, *_ = ds_interlock.initialize(model=net, config=config)
    generator = torch.Generator().manual_seed(0)
    data = [tuple(torch.randn(2, 4, WIDTH, generator=generator)) for _ in range(3)]
    try:
        if check:
            engine.check_walks(iter(data[:1]))
        if kernel:
            return None
        engine.train_batch(iter(data[1:]))
        engine.drain()
        return {name: value.clone() for name, value in net.state_dict().items()}
    except ConfigError as error:
        return str(error)
    finally:
        engine.destroy()


def run_all() -> dict[str, Any]:
    """On a rank."""
    bad = ScalesWhatItSaved.__name__
    return {
        "refusals": {mode: run(mode, kernel=bad) for mode in MODES},
        "refusal under checkpointing": run("window 2", kernel=bad, checkpointing=True),
        "checked": {mode: run(mode) for mode in MODES},
        "unchecked": {mode: run(mode, check=False) for mode in MODES},
    }


@pytest.fixture(scope="module")
def outcomes(ranks4: RankPool) -> list[dict[str, Any]]:
    """What each rank says."""
    return ranks4.run(run_all)


@pytest.mark.bad_input
def test_a_kernel_is_refused_by_name_where_its_stage_walks_back_twice(outcomes: list[dict[str, Any]]) -> None:
    for mode in MODES:
        refusals = [outcome["refusals"][mode] for outcome in outcomes]
        if mode in ("global", "local"):
            assert refusals == [None] * 4, mode
            continue
        assert [refusal is None for refusal in refusals] == [True, True, False, True], mode
        assert "layer 5 (KernelLayer) gives other gradients" in refusals[2]
        assert "the backward pass of ScalesWhatItSaved changes what its forward saved" in refusals[2]


def test_what_is_recomputed_for_each_walk_passes(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome["refusal under checkpointing"] for outcome in outcomes] == [None] * 4


def test_the_check_changes_nothing(outcomes: list[dict[str, Any]]) -> None:
    for mode in MODES:
        for outcome in outcomes:
            checked, unchecked = outcome["checked"][mode], outcome["unchecked"][mode]
            assert checked.keys() == unchecked.keys()
            assert all(torch.equal(value, unchecked[name]) for name, value in checked.items())
