"""``ds_interlock.initialize``: what ``deepspeed.initialize`` is for DeepSpeed."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import logger
from torch import distributed as dist
from torch import nn

from ds_interlock.config import InterlockConfig, check_deepspeed, read_deepspeed
from ds_interlock.config.deepspeed import MAY_DIFFER, MUST_AGREE
from ds_interlock.engine.engine import InterlockEngine
from ds_interlock.engine.module import InterlockPipelineModule
from ds_interlock.engine.unused_heads import UNUSED_PHASES, check_unused_heads
from ds_interlock.errors import ConfigError
from ds_interlock.transport.agreement import agree
from ds_interlock.transport.start import init_distributed


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[InterlockEngine, Any, Any, Any]:
    """Makes the engine for an ``InterlockPipelineModule``. Takes what ``deepspeed.initialize`` takes.

    The mode comes from the ``"interlock"`` section of the config; without one it is global.

    Returns:
        ``(engine, optimizer, training_dataloader, lr_scheduler)``, as DeepSpeed does.

    Raises:
        ConfigError: If the config, the model or the ranks of the job do not fit together.
    """
    config = config or config_params or getattr(args, "deepspeed_config", None)
    model, config = _checked(model, mpu, mesh_param, config)
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    shared = {key: config[key] for key in MUST_AGREE if key in config}
    agree(
        {"config": shared, "layers": len(model._layer_specs), "stage_bounds": list(model.parts)},
        may_differ=[f"config.{path}" for path in MAY_DIFFER],
    )
    model.bind(InterlockConfig.from_deepspeed(config))
    if model.num_stages == 1 and not model.bound_config.is_global and dist.get_rank() == 0:
        name = model.bound_config.mode_name
        logger.warning('interlock: one stage has no border: mode "%s" is ordinary backpropagation here', name)
    model.add_placeholder()
    groups = _groups(model)
    brings_own = model_parameters is not None or optimizer is not None
    if not brings_own:
        model_parameters, config = _parameter_groups(groups, config)
    else:
        _check_scales(model, groups)
        if model.placeholder is not None:
            model_parameters = [p for p in model.parameters() if p.requires_grad]
    grid = model.mpu()
    engine = InterlockEngine(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        mpu=grid,
        dist_init_required=False,
        collate_fn=collate_fn,
        config=config,
        config_class=DeepSpeedConfig(config, grid),
    )
    _check_optimizer_has_heads(engine)
    check_unused_heads(model, engine.optimizer, own=brings_own, zero=engine.zero_optimization())
    engine._configure_python_gc()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _checked(
    model: nn.Module | None, mpu: Any, mesh_param: Any, config: Any
) -> tuple[InterlockPipelineModule, dict[str, Any]]:
    """The model and the config as a dict, if they can be used at all."""
    if not isinstance(model, InterlockPipelineModule):
        raise ConfigError(
            "ds_interlock.initialize needs a ds_interlock.InterlockPipelineModule, got "
            f"{type(model).__name__}: use it in place of deepspeed.pipe.PipelineModule"
        )
    if mpu is not None:
        raise ConfigError("mpu must be None: the process groups of a pipeline come from its module")
    if mesh_param is not None:
        raise ConfigError("mesh_param is not supported with pipelines: use topology= of the module")
    if config is None:
        raise ConfigError("no DeepSpeed config: pass config= (a path or a dict) or --deepspeed_config")
    config = dict(config) if isinstance(config, Mapping) else read_deepspeed(config)
    check_deepspeed(config)
    return model, config


class _Group(NamedTuple):
    """What parameters in one group of the optimizer have in common."""

    scale: float
    """Of their learning rate."""
    unused_phases: tuple[int, ...]
    """In these they must not change."""


def _groups(model: InterlockPipelineModule) -> dict[_Group, list[nn.Parameter]]:
    """The trainable parameters of this stage by group, those at the configured rate first.

    A parameter may have an attribute ``learning_rate_scale`` of its own.
    """
    of_heads = {
        id(parameter): _Group(model.bound_config.head.learning_rate_scale, model.unused_phases(int(number)))
        for number, head in model.heads.items()
        for parameter in head.parameters()
    }
    groups: dict[_Group, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = getattr(parameter, "learning_rate_scale", 1.0)
        if not isinstance(own, int | float) or not 0 < own < math.inf:
            raise ConfigError(f"{name}.learning_rate_scale is {own!r}: expected a number above 0")
        scale, unused_phases = of_heads.get(id(parameter), _Group(1.0, ()))
        groups.setdefault(_Group(own * scale, unused_phases), []).append(parameter)
    return {group: groups[group] for group in sorted(groups, key=lambda group: (group.scale != 1.0, group))}


def _check_scales(model: InterlockPipelineModule, groups: Iterable[_Group]) -> None:
    scales = {group.scale for group in groups} | {model.bound_config.head.learning_rate_scale}
    if scales != {1.0}:
        raise ConfigError(
            "interlock.head.learning_rate_scale works with the optimizer of the JSON config, and so does "
            "learning_rate_scale of a parameter; with an optimizer or parameters of your own, make a group "
            "for each learning rate yourself (model.head_parameters() are those of the heads)"
        )


def _parameter_groups(
    groups: Mapping[_Group, list[nn.Parameter]], config: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The parameters for DeepSpeed's optimizer, and a config whose scheduler has a rate for each group."""
    if list(groups) == [_Group(1.0, ())]:
        return groups[_Group(1.0, ())], config
    config = copy.deepcopy(config)
    rate = config.get("optimizer", {}).get("params", {}).get("lr", 1e-3)
    params = config.get("scheduler", {}).get("params", {})
    for name, value in params.items():
        if name.endswith("_lr") and isinstance(value, int | float):
            params[name] = [value * group.scale for group in groups]
    listed = [
        {"params": parameters}
        | ({} if group.scale == 1.0 else {"lr": rate * group.scale})
        | ({UNUSED_PHASES: list(group.unused_phases)} if group.unused_phases else {})
        for group, parameters in groups.items()
    ]
    return listed, config


def _check_optimizer_has_heads(engine: InterlockEngine) -> None:
    """Parameters collected before ``initialize`` bound the heads would leave them untrained."""
    if engine.optimizer is None or engine.using_bf16_optimizer or engine.zero_optimization():
        return
    trained = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    missing = [
        name for name, p in engine.module.heads.named_parameters() if p.requires_grad and id(p) not in trained
    ]
    if missing:
        raise ConfigError(
            f"the optimizer does not train the heads ({', '.join(missing)}): pass interlock= to "
            "InterlockPipelineModule, or leave out model_parameters"
        )
