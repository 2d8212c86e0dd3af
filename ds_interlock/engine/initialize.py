"""``ds_interlock.initialize``: what ``deepspeed.initialize`` is for DeepSpeed."""

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from deepspeed import set_optimizer_flags
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import logger
from torch import distributed as dist
from torch import nn

from ds_interlock.config import InterlockConfig, check_deepspeed, check_filled_in, read_deepspeed
from ds_interlock.config.deepspeed import MAY_DIFFER, MUST_AGREE
from ds_interlock.config.parts import SECTION
from ds_interlock.engine.deepspeed_side import without_first_message
from ds_interlock.engine.engine import InterlockEngine
from ds_interlock.engine.module import InterlockPipelineModule
from ds_interlock.engine.parameter_groups import (
    check_equal_groups,
    check_unused_heads,
    has_one_rate,
    with_groups_of_heads,
)
from ds_interlock.engine.reports import job_store
from ds_interlock.errors import ConfigError
from ds_interlock.transport.agreement import agree, raised_by_all
from ds_interlock.transport.failures import FailureLog, Sections
from ds_interlock.transport.start import backend_of, init_distributed


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

    The mode comes from the ``"interlock"`` section of the config; without one it is global. Heads that the
    section asks for join ``model_parameters`` (``engine/parameter_groups.py`` says how).

    Returns:
        ``(engine, optimizer, training_dataloader, lr_scheduler)``, as DeepSpeed does.

    Raises:
        ConfigError: If the config, the model or the ranks of the job do not fit together.
    """
    config = config or config_params
    if (of_args := getattr(args, "deepspeed_config", None)) is not None:
        if config is not None:
            raise ConfigError("got two DeepSpeed configs, config= and --deepspeed_config: leave out one")
        config = of_args
    model, config = _checked(model, mpu, mesh_param, config)
    unchecked = config.get(SECTION)  # ranks meet first: others would wait for one that fails now
    unchecked = unchecked if isinstance(unchecked, Mapping) else {}
    init_distributed(
        backend_of(unchecked.get("transport")),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )
    log = FailureLog(job_store(), lambda rank: int(model._topo.get_coord(rank).pipe))
    with closing(log), Sections(log, {"setup": _setup_seconds(unchecked)}, lambda: 0).enter("setup"):
        shared = {key: config[key] for key in MUST_AGREE if key in config}
        agree(
            {"config": shared, "layers": len(model._layer_specs), "stage_bounds": list(model.parts)},
            may_differ=[f"config.{path}" for path in MAY_DIFFER],
        )
        model.bind(InterlockConfig.from_deepspeed(config))
        if model.num_stages == 1 and not model.interlock.is_global and dist.get_rank() == 0:
            name = model.interlock.mode_name
            logger.warning(
                'interlock: one stage has no border: mode "%s" is ordinary backpropagation here', name
            )
        model.add_placeholder()
        own = hasattr(optimizer, "param_groups")
        with raised_by_all():
            if own:
                _check_optimizer(model, optimizer)
            else:
                model_parameters, config = with_groups_of_heads(model, optimizer, model_parameters, config)
        grid = model.mpu()
        config_class = DeepSpeedConfig(config, grid)
        set_optimizer_flags(config_class, model)
        with without_first_message():
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
                config_class=config_class,
            )
        model.let_heads_return_what_the_model_does()
        check_unused_heads(model, engine.optimizer, own=own, zero=engine.zero_optimization())
        check_equal_groups(model, engine.optimizer)
        engine._configure_python_gc()
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _setup_seconds(unchecked: Mapping[str, Any]) -> float:
    value = unchecked.get("setup_timeout_seconds")
    if isinstance(value, int | float) and value > 0:
        return float(value)
    return InterlockConfig().setup_timeout_seconds


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
    check_filled_in(config)
    return model, config


def _check_optimizer(model: InterlockPipelineModule, optimizer: Any) -> None:
    """Refuses an optimizer of the user's own that would leave heads untrained, or has to have groups."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [n for n, p in model.heads.named_parameters() if p.requires_grad and id(p) not in trained]
    if missing:
        raise ConfigError(
            f"the optimizer does not train the heads ({', '.join(missing)}): pass interlock= to "
            "InterlockPipelineModule, and add model.head_parameters() to the optimizer; or pass a function "
            "that makes the optimizer, or model_parameters: then heads join by themselves"
        )
    if not has_one_rate(model):
        raise ConfigError(
            "interlock.head.learning_rate_scale works with the optimizer of the JSON config, and so does "
            "learning_rate_scale of a parameter; with an optimizer of your own, make a group for each "
            "learning rate yourself (model.head_parameters() are those of the heads)"
        )
