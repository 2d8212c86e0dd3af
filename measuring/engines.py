"""This package's and DeepSpeed's engine on a workload, and how long a batch takes on them.

Gloo's groups poll their connections for as long as their process lives, and DeepSpeed makes a dozen for
every engine: what is timed gets processes of its own.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor

import ds_interlock
from ds_interlock.errors import ConfigError
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead
from ds_interlock.transport.local_ranks import run_local_ranks

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Workload:
    """What is trained; ``head`` and ``plan`` are those of ``InterlockPipelineModule``."""

    layers: list[LayerSpec]
    layer_seconds: list[float]  # in any unit: stages are cut to take the same, if they have no bounds
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    micro_batch: tuple[Tensor, Tensor]  # inputs and labels of every micro-batch
    head: Callable[[LossHead], torch.nn.Module] | None = None
    plan: Callable[[list[int]], GradientFlowPlan] | None = None
    stage_bounds: Sequence[int] | None = None

    def bounds(self, num_stages: int) -> list[int]:
        """Where the layers are cut: ``num_stages + 1`` rising layer numbers."""
        bounds = self.stage_bounds or partition_balanced(self.layer_seconds, num_stages)
        return [int(bound) for bound in bounds]


def run_ranks(
    work: Callable[..., Any],
    num_ranks: int,
    *,
    device: str = "cpu",
    backend: str = "gloo",
    timeout_seconds: float | None = None,
    **arguments: Any,
) -> list[Any]:
    """Calls ``work(**arguments)`` on ``num_ranks`` ranks after process-group initialisation.

    ``work`` is at the top of a module, ``arguments`` can be pickled. Returns the results by rank.

    Raises:
        RankError: If it failed on a rank; with that rank's traceback and the end of its log.
        TimeoutError: If the time is up, with the ends of the logs.
    """
    joined, preload = partial(_join_and_work, work, backend, arguments), ["torch.distributed.pipelining"]
    return run_local_ranks(joined, num_ranks, device=device, preload=preload, timeout_seconds=timeout_seconds)


def _join_and_work(work: Callable[..., Any], backend: str, arguments: dict[str, Any]) -> Any:
    ds_interlock.init_distributed(dist_backend=backend)
    return work(**arguments)


def make_engine(work: Workload, section: Mapping[str, Any] | None) -> Any:
    """An engine with plain SGD, on this rank of a job that has one stage per rank.

    ``section`` is the ``"interlock"`` section; None for DeepSpeed's own engine.

    Raises:
        ConfigError: If DeepSpeed does not cut the model into stages of the same time.
    """
    torch.manual_seed(0)
    num_stages = dist.get_world_size()
    model: dict[str, Any] = {"layers": work.layers, "loss_fn": work.loss_fn, "num_stages": num_stages}
    model |= {"stage_bounds": work.stage_bounds} if work.stage_bounds else {"partition_method": "uniform"}
    config = {
        "train_micro_batch_size_per_gpu": len(work.micro_batch[0]),
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "steps_per_print": None,
    }
    if section is None:
        net = PipelineModule(**model)
        engine = deepspeed.initialize(model=net, config=config)[0]
    else:
        config["interlock"] = section
        interlock = ds_interlock.InterlockConfig.from_deepspeed(config)
        net = ds_interlock.InterlockPipelineModule(
            **model, interlock=interlock, head=work.head, plan=work.plan
        )
        engine = ds_interlock.initialize(model=net, config=config)[0]
    if list(net.parts) != work.bounds(num_stages):
        raise ConfigError(
            f"stages that take the same time end at layers {work.bounds(num_stages)}, but DeepSpeed cuts at "
            f"{list(net.parts)}, into stages of as many layers: choose another number of layers"
        )
    return engine


def seconds_of_a_batch(engine: Any, work: Workload, num_micro_batches: int, num_batches: int) -> float:
    """Seconds that a batch takes on the slowest stage, once the pipeline is running. All ranks call it.

    ``num_batches`` are timed, after two that are not. The engine is from ``make_engine`` or has the same
    ``train_batch`` and ``set_train_batch_size``.

    Raises:
        ValueError: If the engine refuses this number of micro-batches.
    """
    engine.set_train_batch_size(num_micro_batches * len(work.micro_batch[0]))
    batches: Iterator[Any] = repeat(work.micro_batch)
    dist.barrier()
    for _ in range(2):
        engine.train_batch(batches)
    start = time.perf_counter()
    for _ in range(num_batches):
        engine.train_batch(batches)
    elapsed = torch.tensor((time.perf_counter() - start) / num_batches)
    if hasattr(engine, "drain"):
        engine.drain()
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return elapsed.item()
