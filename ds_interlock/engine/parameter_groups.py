"""The groups of parameters that the optimizer gets: the user's, with the heads in them; some stay unused.

    model_parameters     [decay, no_decay]          as the script has them, or one group of all that learns
    what is not listed    + heads                   join the last group (so does a placeholder)
    what they need        + their own groups        a rate of their own, phases without them, flat copies

A script lists its parameters before ``initialize`` makes the heads. They join if the list has all that learns
in this stage's layers; who lists less has to list the heads too.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor, nn

from ds_interlock.config.deepspeed import DEFAULT_RATES
from ds_interlock.engine.module import InterlockPipelineModule
from ds_interlock.errors import ConfigError
from ds_interlock.heads.factory import block_parameters
from ds_interlock.transport.agreement import gather

UNUSED_PHASES = "idle_phases"
"""Key of a parameter group of the optimizer, also in checkpoints: the phases that do not use it."""

Config = dict[str, Any]
Group = dict[str, Any]


class _Kind(NamedTuple):
    """What parameters in one group of the optimizer have in common, besides what the user's group says."""

    scale: float = 1.0
    """Of their learning rate."""
    unused_phases: tuple[int, ...] = ()
    """In these they must not change."""
    apart: bool = False
    """Whether they count their optimizer's steps themselves: flat copies have one count for each group."""


def with_groups_of_heads(
    model: InterlockPipelineModule, optimizer: Any, model_parameters: Any, config: Config
) -> tuple[list[Any], Config]:
    """The parameters for the optimizer, and a config whose scheduler has a rate for each group.

    Args:
        model: The module, with its heads.
        optimizer: None for the one of the JSON config, or a function that makes one.
        model_parameters: The user's: parameters, groups of them, or None for all.
        config: The DeepSpeed config.

    Raises:
        ConfigError: If heads cannot join, or a learning rate cannot be scaled.
    """
    groups, is_grouped = _users_groups(model, optimizer, model_parameters)
    _add_what_is_not_listed(model, groups)
    kinds = _kinds(model, apart=_steps_flat_copies(config) and not model.keeps_ties)
    parts: list[tuple[int, _Kind, list[nn.Parameter]]] = []
    for number, group in enumerate(groups):
        of_kind: dict[_Kind, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            of_kind.setdefault(kinds.get(id(parameter), _Kind()), []).append(parameter)
        parts += [(number, k, of_kind[k]) for k in sorted(of_kind, key=lambda k: (k.scale != 1.0, k))]
    if all(kind == _Kind(apart=kind.apart) for _, kind, _ in parts) and len(parts) <= len(groups):
        return (groups if is_grouped else groups[0]["params"]), config
    settings = {} if optimizer is not None else config.get("optimizer") or {}
    if str(settings.get("type")).lower() == "muon" and any(k != _Kind(apart=k.apart) for _, k, _ in parts):
        raise ConfigError(
            'optimizer.type "Muon" makes groups of its own: leave out learning_rate_scale (of parameters, or '
            "interlock.head) and phases of interlock.schedule that do not use all heads"
        )
    default = getattr(optimizer, "keywords", {}).get("lr")  # of functools.partial
    if optimizer is None:
        default = settings.get("params", {}).get("lr", 1e-3)
    listed = [_part_of(groups[number], kind, parameters, default) for number, kind, parameters in parts]
    return listed, _with_rates(config, len(groups), [(number, kind.scale) for number, kind, _ in parts])


def has_one_rate(model: InterlockPipelineModule) -> bool:
    """Whether nothing in this stage, or in the configuration of heads, scales a learning rate."""
    scales = {kind.scale for kind in _kinds(model, apart=False).values()}
    return scales | {model.interlock.head.learning_rate_scale} == {1.0}


def _users_groups(
    model: InterlockPipelineModule, optimizer: Any, model_parameters: Any
) -> tuple[list[Group], bool]:
    """The user's groups, which generators give only once; and whether they came as groups."""
    if model_parameters is None:
        # A function gets what DeepSpeed would give it.
        all_of_them = optimizer is not None
        model_parameters = [p for p in model.parameters() if p.requires_grad or all_of_them]
    given = list(model_parameters)
    if given and isinstance(given[0], dict):
        groups = [dict(group) for group in given]
        for group in groups:
            parameters = group["params"]
            group["params"] = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
        return groups, True
    return [{"params": given}], False


def _add_what_is_not_listed(model: InterlockPipelineModule, groups: list[Group]) -> None:
    listed = {id(parameter) for group in groups for parameter in group["params"]}
    missing = [p for p in model.head_parameters() if id(p) not in listed]
    left_out = [p for p in model.layer_parameters() if id(p) not in listed]
    if missing and left_out:
        names = ", ".join(n for n, p in model.named_parameters() if any(p is other for other in left_out))
        raise ConfigError(
            f"model_parameters lacks some of what learns in the layers of stage {model.stage_id} ({names} "
            "are missing), so heads cannot join by themselves. Add these parameters, or freeze them "
            "(requires_grad_(False)); or pass interlock= to InterlockPipelineModule, and add "
            "model.head_parameters() to model_parameters"
        )
    if model.placeholder is not None and id(model.placeholder) not in listed:
        missing.append(model.placeholder)
    groups[-1]["params"] += missing


def _kinds(model: InterlockPipelineModule, *, apart: bool) -> dict[int, _Kind]:
    """The kinds of this stage's trainable parameters, by their ids.

    A parameter may have an attribute ``learning_rate_scale`` of its own.
    """
    of_heads: dict[int, _Kind] = {}
    for number, head in model.heads.items():
        kind = _Kind(model.interlock.head.learning_rate_scale, model.unused_phases(int(number)), apart)
        of_heads |= {id(p): kind for p in head.parameters()}
        of_heads |= {id(p): kind._replace(scale=1.0) for p in block_parameters(head)}
    of_layers = set(map(id, model.layer_parameters()))
    kinds = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = getattr(parameter, "learning_rate_scale", 1.0)
        if not isinstance(own, int | float) or not 0 < own < math.inf:
            raise ConfigError(f"{name}.learning_rate_scale is {own!r}: expected a number above 0")
        kind = _Kind() if id(parameter) in of_layers else of_heads.get(id(parameter), _Kind())
        kinds[id(parameter)] = kind._replace(scale=own * kind.scale)
    return kinds


def _steps_flat_copies(config: Config) -> bool:
    """Whether DeepSpeed's optimizer steps flat copies of whole groups: under bf16, and ZeRO."""
    is_bf16 = any(config.get(key, {}).get("enabled") for key in ("bf16", "bfloat16"))
    return bool(is_bf16 or config.get("zero_optimization", {}).get("stage"))


def _part_of(group: Group, kind: _Kind, parameters: list[nn.Parameter], default_rate: float | None) -> Group:
    part = {**group, "params": parameters}
    if kind.scale != 1.0:
        rate = group.get("lr", default_rate)
        if rate is None:
            raise ConfigError(
                "interlock.head.learning_rate_scale, or that of a parameter, needs a rate to multiply: with "
                'a function that makes the optimizer, pass model_parameters as groups that have an "lr" '
                "each, or make it functools.partial(function, lr=...)"
            )
        part["lr"] = rate * kind.scale
    if kind.unused_phases:
        part[UNUSED_PHASES] = list(kind.unused_phases)
    return part


def _with_rates(config: Config, num_groups: int, parts: Iterable[tuple[int, float]]) -> Config:
    """The config with a scheduler's rates for each part of a group: its number, and its scale.

    One rate for all stays one: Muon's groups are not these.
    """
    parts = list(parts)
    config = copy.deepcopy(config)
    scheduler = config.get("scheduler") or {}
    params = scheduler["params"] = DEFAULT_RATES.get(str(scheduler.get("type")), {}) | scheduler.get(
        "params", {}
    )
    for name, value in params.items():
        if not isinstance(value, list) and all(scale == 1.0 for _, scale in parts):
            continue
        rates = value if isinstance(value, list) else [value] * num_groups
        if name.endswith("_lr") and len(rates) == num_groups and isinstance(rates[0], int | float):
            params[name] = [rates[number] * scale for number, scale in parts]
    return config


class UnusedHeads:
    """Keeps heads as they are that the present phase of a schedule does not use.

    No loss gives them gradients, but DeepSpeed gives a float32 parameter without a gradient one of zeros, and
    its bf16 and ZeRO optimizers step flat copies of whole groups. So the former are taken away again, and the
    heads of the same phases are groups of their own, without gradient and step.
    """

    def __init__(self, module: InterlockPipelineModule, optimizer: Any, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._of_layers = set(map(id, module.layer_parameters(frozen=True)))
        if optimizer is None or not has_unused_heads(module):
            return
        inner = optimizer.optimizer if isinstance(optimizer, ZeROOptimizer) else optimizer
        inner.register_step_pre_hook(self._drop_gradients_of_groups)
        if hasattr(optimizer, "get_grad_norm_direct"):
            self._leave_out_of_the_norm(optimizer)

    def drop_gradients(self) -> None:
        """Takes away the gradients of zero that DeepSpeed gives them."""
        for number, head in self._module.heads.items():
            if self._module.schedule.is_idle(int(number), self._module.phase):
                for parameter in head.parameters():
                    if id(parameter) not in self._of_layers:
                        parameter.grad = None

    def _is_unused(self, group: dict[str, Any]) -> bool:
        return self._module.phase in group.get(UNUSED_PHASES, ())

    def _drop_gradients_of_groups(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in filter(self._is_unused, optimizer.param_groups):
            for parameter in group["params"]:
                parameter.grad = None

    def _leave_out_of_the_norm(self, zero: Any) -> None:
        """ZeRO's norm has one collective per group; over the pipe all stages must have equally many."""
        norm_of = zero.get_grad_norm_direct

        def norm(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter], norm_type: int = 2) -> Any:
            for number, group in enumerate(zero.optimizer.param_groups):
                if parameters is zero.params_in_partition[number] and self._is_unused(group):
                    return torch.zeros((), device=self._device)
            return norm_of(gradients, parameters, norm_type)

        zero.get_grad_norm_direct = norm


def check_unused_heads(module: InterlockPipelineModule, optimizer: Any, *, own: bool, zero: bool) -> None:
    """Refuses on every rank what would change unused heads: an optimizer of the user's ``own``, ``zero``."""
    if not has_unused_heads(module):
        return
    if own and isinstance(optimizer, ZeROOptimizer):
        raise ConfigError(
            "interlock.schedule: some phases do not use all heads; with bf16 or ZeRO this needs the "
            "optimizer of the JSON config, or a function that makes it from its parameters"
        )
    if module.keeps_ties and zero:
        raise ConfigError(
            'interlock.tied_weights: "sync" cannot be combined with ZeRO and a schedule whose phases use '
            'different heads; use "untie", or zero_optimization.stage 0'
        )


def check_equal_groups(module: InterlockPipelineModule, optimizer: Any) -> None:
    """Refuses on every rank what would wait for ever: ZeRO's norm has a collective for each group."""
    if not hasattr(optimizer, "get_grad_norm_direct"):
        return
    for number, phase in enumerate(module.schedule.phases):
        if not module.interlock.steps_alone(phase.plan, tied=module.keeps_ties):
            groups = [g for g in optimizer.param_groups if number not in g.get(UNUSED_PHASES, ())]
            numbers = gather((module.stage_id, len(groups)))
            if len({num_groups for _, num_groups in numbers}) > 1:
                told = ", ".join(
                    f"stage {stage} has {num_groups}" for stage, num_groups in sorted(set(numbers))
                )
                raise ConfigError(
                    "under ZeRO all stages that step together must have equally many groups of parameters: "
                    f"{told}; give parameters on every stage the same values of learning_rate_scale "
                    "(those of heads have interlock.head.learning_rate_scale), or use "
                    "zero_optimization.stage 0"
                )


def has_unused_heads(module: InterlockPipelineModule) -> bool:
    """Whether any head of any stage is unused in some phase: the same on all ranks."""
    return any(module.unused_phases(head) for head in range(len(module.schedule.heads)))
