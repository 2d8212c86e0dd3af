"""``ds_interlock.init_distributed``: joins the job as DeepSpeed does, on a CPU without its compiler."""

import os
from importlib import import_module
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator


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
