"""Interlocking backpropagation for DeepSpeed pipelines: each loss trains a window of stages.

    import ds_interlock

    interlock = ds_interlock.InterlockConfig.from_deepspeed("ds_config.json")
    net = ds_interlock.InterlockPipelineModule(layers, loss_fn=loss_fn, num_stages=4, interlock=interlock)
    engine, *_ = ds_interlock.initialize(model=net, config="ds_config.json", training_data=data)
    loss = engine.train_batch()

What needs torch and DeepSpeed is imported when it is first used: planning does without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ds_interlock.config import HeadConfig, InterlockConfig
from ds_interlock.errors import ConfigError, DataError, NonfiniteError, PeerError, PlanError, ScheduleError
from ds_interlock.schedule.phases import PlanSchedule
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead

if TYPE_CHECKING:
    from ds_interlock.engine.engine import InterlockEngine
    from ds_interlock.engine.initialize import initialize
    from ds_interlock.engine.module import InterlockPipelineModule
    from ds_interlock.stage.in_process import InProcessPipeline
    from ds_interlock.transport.start import init_distributed

__version__ = "0.1.0"

_IMPORTED_LATER = {
    "InProcessPipeline": "stage.in_process",
    "InterlockEngine": "engine.engine",
    "InterlockPipelineModule": "engine.module",
    "init_distributed": "transport.start",
    "initialize": "engine.initialize",
}

__all__ = [
    "ConfigError",
    "DataError",
    "GradientFlowPlan",
    "HeadConfig",
    "InProcessPipeline",
    "InterlockConfig",
    "InterlockEngine",
    "InterlockPipelineModule",
    "LossHead",
    "NonfiniteError",
    "PeerError",
    "PlanError",
    "PlanSchedule",
    "ScheduleError",
    "init_distributed",
    "initialize",
]


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_IMPORTED_LATER[name]}"), name)
