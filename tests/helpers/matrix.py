"""Every combination of precision, replicas, checkpointing, compilation and mode: what it gives, or why not.

A combination trains a small language model for a few steps on four stages. What counts is how far its weights
have moved: compared with one process that runs the same plan in float32.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from engine_jobs import layers, loss_fn, micro_batches
from torch import Tensor, nn

from ds_interlock import ConfigError, InProcessPipeline, InterlockConfig
from ds_interlock.heads.factory import head_factory

NUM_STAGES = 4
BOUNDS = [0, 3, 6, 8, 11]
NUM_STEPS, NUM_MICRO_BATCHES = 3, 2
LEARNING_RATE, MOMENTUM = 0.1, 0.9

_BF16 = {"bf16": {"enabled": True}}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": _BF16,
    "bf16, ZeRO-1": {**_BF16, "zero_optimization": {"stage": 1}},
    "bf16, ZeRO-1, CPU offload": {
        **_BF16,
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
MODES: dict[str, dict[str, Any]] = {
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    **{f"window {n:g}": {"mode": "interlock", "window": n} for n in (1.5, 2, 3)},
}
LIMIT = {name: 1e-5 if name == "fp32" else 0.05 for name in PRECISIONS}
"""Of the distance between two movements, in lengths of the right one."""


@dataclass(frozen=True)
class Combination:
    """One of 200."""

    precision: str
    replicas: int
    checkpointing: bool
    compiled: bool
    mode: str

    def config(self) -> dict[str, Any]:
        """The DeepSpeed config. Stages clip by other norms than the whole model, so nothing is clipped."""
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": NUM_MICRO_BATCHES,
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE, "momentum": MOMENTUM}},
            "zero_allow_untested_optimizer": True,
            "interlock": {"timeout_seconds": 60, **MODES[self.mode]},
            **copy.deepcopy(PRECISIONS[self.precision]),
        }


def combinations() -> list[Combination]:
    """All of them."""
    return [
        Combination(*values)
        for values in itertools.product(PRECISIONS, (1, 2), (False, True), (False, True), MODES)
    ]


def model() -> list[nn.Module]:
    """The layers with fixed weights that bfloat16 has."""
    built = []
    for number, spec in enumerate(layers()):
        torch.manual_seed(number)
        built.append(spec.build().bfloat16().float())
    return built


def reference(mode: str, replicas: int) -> dict[str, Tensor]:
    """The movement of every weight of the layers, float32, in one process."""
    config = InterlockConfig.from_deepspeed({"interlock": MODES[mode]})
    built = model()
    net = InProcessPipeline(built, loss_fn, config.plan(BOUNDS), head_factory(config.head, built))
    _round(net.heads)
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM)
    data = [iter(_data(replica)) for replica in range(replicas)]
    for _ in range(NUM_STEPS):
        net.accumulate_gradients([next(own) for own in data for _ in range(NUM_MICRO_BATCHES)])
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() - start[name] for name, parameter in net.named_parameters()}


@torch.no_grad()
def _round(heads: nn.Module) -> None:
    for parameter in heads.parameters():
        parameter.copy_(parameter.bfloat16())


def _data(replica: int) -> list[Any]:
    return micro_batches(NUM_STEPS * NUM_MICRO_BATCHES, replica=replica)


def train_all(chosen: Sequence[Combination]) -> list[dict[str, Tensor] | str]:
    """For each combination the movement of this rank's weights, or why it is refused. On a rank."""
    return [_train(combination) for combination in chosen]


def _train(combination: Combination) -> dict[str, Tensor] | str:
    import ds_interlock

    config = combination.config()
    try:
        net = ds_interlock.InterlockPipelineModule(
            model(),
            interlock=InterlockConfig.from_deepspeed(config),
            loss_fn=loss_fn,
            num_stages=NUM_STAGES,
            stage_bounds=BOUNDS,
            activation_checkpoint_interval=int(combination.checkpointing),
        )
        _round(net.heads)
        engine, *_ = ds_interlock.initialize(model=net, config=config)
        if combination.compiled:
            engine.compile(backend="aot_eager")
    except ConfigError as error:
        return str(error)
    start = {name: parameter.detach().float().clone() for name, parameter in net.named_parameters()}
    data = iter(_data(engine.grid.get_data_parallel_rank()))
    for _ in range(NUM_STEPS):
        engine.train_batch(data)
    engine.drain()
    moved = {name: _master(p).float() - start[name] for name, p in net.named_parameters()}
    engine.destroy()
    return {name.replace("._orig_mod", ""): value.detach().clone() for name, value in moved.items()}


def _master(parameter: nn.Parameter) -> Tensor:
    """The float32 weight that the optimizer steps: the one in bfloat16 may not have moved at all."""
    from deepspeed.utils import safe_get_full_fp32_param

    if not hasattr(parameter, "_hp_mapping"):
        return parameter
    full = safe_get_full_fp32_param(parameter)
    assert full is not None
    return full


def distance(moved: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest distance of a weight's movement from the right one, in lengths of the right one."""
    return max(float((moved[name] - right[name]).norm() / right[name].norm()) for name in moved)


Result = float | str
"""The distance from one process, or why the combination is refused."""


def results(chosen: Sequence[Combination], by_rank: Sequence[Sequence[Any]]) -> list[Result]:
    """For each combination the largest distance on any rank, or the reason that all ranks gave."""
    outcomes: list[Result] = []
    for combination, *of_ranks in zip(chosen, *by_rank, strict=True):
        right = reference(combination.mode, combination.replicas)
        reasons = {moved for moved in of_ranks if isinstance(moved, str)}
        distances = [distance(moved, right) for moved in of_ranks if isinstance(moved, dict)]
        assert not (reasons and distances), f"{combination}: refused on some ranks only: {reasons}"
        outcomes.append(max(distances) if distances else "; ".join(sorted(reasons)))
    return outcomes
