"""``ds_interlock.init_distributed``: joins the job as DeepSpeed does, on a CPU without its compiler."""

import os
from datetime import timedelta
from functools import cache
from importlib import import_module
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

LONG = timedelta(days=1)
"""More than any rank needs before it comes to a message of the control group."""


def init_distributed(*args: Any, **kwargs: Any) -> None:
    """Takes what ``deepspeed.init_distributed`` takes.

    On CPUs DeepSpeed compiles, in every process, an all-reduce that only its inference uses. That takes
    seconds, and a process that is killed meanwhile leaves a lock on which every later job of the machine
    waits for ever. So it is left out there.

    On an accelerator it also chooses the device ``LOCAL_RANK``: what is gathered before DeepSpeed's engine
    chooses would use another.
    """
    if get_accelerator().device_name() == "cpu":
        # By its full name: `deepspeed.comm` has torch itself under the name of this module.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(*args, **kwargs)
    if get_accelerator().device_name() != "cpu" and "LOCAL_RANK" in os.environ:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if (world := dist.group.WORLD) and dist.get_backend() == "gloo":
        # DeepSpeed binds it to a GPU, and torch would then split it, as only NCCL's groups can be.
        world.bound_device_id = None


def backend_of(transport: object) -> str | None:
    """DeepSpeed's ``dist_backend`` for ``interlock.transport``; None leaves it to DeepSpeed."""
    return "gloo" if transport == "gloo" else None


def control_group() -> Any:
    """The gloo group of all ranks, over which they tell each other what is not training. All must call it.

    A rank may take hours before it comes to such a message: it downloads, converts, tokenises or writes. In
    a collective of NCCL's its watchdog would end the others meanwhile, without a word.
    """
    world = dist.group.WORLD
    return world if dist.get_backend(world) == "gloo" else _gloo_beside(world)


@cache
def _gloo_beside(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=LONG)
