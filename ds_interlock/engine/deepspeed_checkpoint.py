"""Checkpoints without our files, which DeepSpeed or a converter of weights wrote.

    layer_00-model_states.pt ...              layers, loaded by DeepSpeed
    mp_rank_00_model_states.pt ...            one file per stage: counters, scheduler; the optimizer's state,
    ..._pp_rank_0_mp_rank_00_optim_states.pt  or under ZeRO one file per rank with its part of it

The state of the optimizer is found by the names of the layers' parameters, as far as a file has names, so
heads may be among ours: theirs starts anew. Everything is read and compared before anything is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.pipe import TiedLayerSpec
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.utils import logger
from torch import Tensor, nn
from torch import distributed as dist

from ds_interlock.engine.checkpoint import Loaded, load_flat_copies
from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.errors import ConfigError
from ds_interlock.transport.agreement import raised_by_all

State = dict[str, Any]

_FP32 = "fp32"
"""Beside the keys of the optimizer's state: the value of a parameter in its precision."""


def is_from_elsewhere(folder: Path) -> bool:
    """Whether there is a checkpoint without our files."""
    return any(folder.glob("layer_*-model_states.pt")) and not any(folder.glob("interlock_stage_*.pt"))


@dataclass
class DeepSpeedCheckpoint:
    """One checkpoint to load, or what is wanted of it."""

    engine: DeepSpeedSide
    folder: Path
    module_only: bool
    with_optimizer: bool
    with_scheduler: bool
    _optimizer_state: State | None = None
    _groups: list[int] = field(default_factory=list)
    """Those of the optimizer that it is for; the others are of heads."""
    _rates: dict[str, list[float]] = field(default_factory=dict)

    def load(self, deepspeed_loads: Callable[..., Loaded], strict: bool) -> Loaded:
        """Loads what is wanted of it, layers and counters with ``deepspeed_loads``; returns what that does.

        Raises:
            ConfigError: On all ranks, if something is missing or does not fit. Nothing has been loaded then.
        """
        with raised_by_all():
            self._check_layers()
            copies = self._untied_copies()
            if not self.module_only:
                self._read_optimizer()
        for module, state in copies:
            module.load_state_dict(state)
        if self.module_only and not self._files_of_stages():  # which some converters do not write
            self.engine.module.load_state_dir(str(self.folder), self.engine.checkpoint_engine, strict)
            result: Loaded = str(self.folder), {}
        else:
            result = deepspeed_loads(load_optimizer_states=False)
        self._load_optimizer()
        if not self.module_only:
            self._give_rates_to_heads()
        if dist.get_rank() == 0:
            self._say_what_there_is()
        return result

    def _files_of_stages(self) -> list[Path]:
        return list(self.folder.glob("mp_rank_*_model_states.pt"))

    def _load_optimizer(self) -> None:
        optimizer, state = self.engine.optimizer, self._optimizer_state
        if state is None:
            if hasattr(optimizer, "refresh_fp32_params"):
                optimizer.refresh_fp32_params()
        elif isinstance(optimizer, ZeROOptimizer):
            load_flat_copies(optimizer, state)
        else:
            optimizer.load_state_dict(state)

    def _say_what_there_is(self) -> None:
        module = self.engine.module
        loaded = "layers" if self._optimizer_state is None else "layers and their optimizer state"
        heads = "; heads start anew" if module.schedule.heads else ""
        if heads and module.make_head is None and module.head_config.type == "lens":
            heads += ' (a "lens" has the output layers as it was built, not as they are in it: docs/heads.md)'
        logger.warning(
            f"interlock: {self.folder} was not written by ds_interlock: loaded {loaded}{heads}; random state "
            "and data position are not in it (put the data iterator where it was)"
        )

    def _check_layers(self) -> None:
        module = self.engine.module
        for index, layer in enumerate(module.forward_funcs):
            if hasattr(layer, "load_state_dict") and not self._files_of_layer(index):
                name = f"layer_{index + module._local_start:02d}-model_states.pt"
                raise ConfigError(f"{self.folder / name} is missing: this is no checkpoint of such a model")

    def _files_of_layer(self, index: int) -> list[str]:
        files: list[str] = self.engine.module.ckpt_layer_path_list(str(self.folder), index)
        return files

    def _untied_copies(self) -> list[tuple[nn.Module, State]]:
        """Modules that other stages share in DeepSpeed, and keep in the file of the layer that is one."""
        module, copies = self.engine.module, []
        if module.tied_comms:
            return []
        for key, tied in module.tied_modules.items():
            whole = [
                index - module._local_start
                for index, spec in enumerate(module._layer_specs)
                if isinstance(spec, TiedLayerSpec) and spec.key == key and spec.forward_fn is None
            ]
            files = [file for index in whole for file in self._files_of_layer(index)]
            if not files:
                raise ConfigError(
                    f"{self.folder} has no file with the tied module {key!r}: DeepSpeed saves it with a "
                    "layer of it that has no forward_fn"
                )
            copies.append((tied, self._load(files[0])))
        return copies

    def _load(self, path: str | Path) -> State:
        state: State = self.engine.checkpoint_engine.load(str(path), map_location="cpu")
        return state

    def _read_optimizer(self) -> None:
        engine, folder = self.engine, self.folder
        num_files = len(self._files_of_stages())
        if num_files != engine.mp_world_size:
            raise ConfigError(
                f"{folder} has {num_files} files mp_rank_*_model_states.pt, expected {engine.mp_world_size}, "
                "one per stage and tensor-parallel rank: use as many stages, or load_checkpoint(..., "
                "load_module_only=True)"
            )
        saved = self._load(engine._get_ckpt_name(str(folder.parent), folder.name))
        if self.with_scheduler and engine.lr_scheduler is not None and not saved.get("lr_scheduler"):
            raise ConfigError(f"{folder} has no scheduler state: use load_lr_scheduler_states=False")
        self._rates = {
            name: list(getattr(engine.lr_scheduler, name))
            for name in ("base_lrs", "_last_lr")
            if isinstance(getattr(engine.lr_scheduler, name, None), list)
        }
        if not self.with_optimizer or engine.optimizer is None:
            return
        try:
            if isinstance(engine.optimizer, ZeROOptimizer):
                parts = _by_name(self._parts(saved))
                self._optimizer_state, self._groups = _flat_state(engine, parts)
            else:
                is_flat = any(folder.glob("*_optim_states.pt"))
                self._optimizer_state, self._groups = _state(engine, saved.get("optimizer"), is_flat=is_flat)
        except _MismatchError as error:
            raise ConfigError(
                f"{folder}: cannot take the optimizer state of stage {engine.module.stage_id}: {error}. Use "
                "load_checkpoint(..., load_optimizer_states=False), or load_module_only=True"
            ) from error

    def _parts(self, saved: State) -> list[State]:
        """What each replica keeps of the flat copies of this stage."""
        engine, folder, num_replicas = self.engine, self.folder, saved["dp_world_size"]
        if saved.get("optimizer"):
            if BASE_OPTIMIZER_STATE not in saved["optimizer"]:
                raise _MismatchError("it was saved in float32 without ZeRO, this job is in bf16 or with ZeRO")
            if num_replicas > 1:
                raise _MismatchError(
                    "without ZeRO, DeepSpeed saves only the first replica's part of it in bf16"
                )
            return [saved["optimizer"]]
        paths = [
            engine._get_rank_zero_ckpt_name(
                str(folder.parent), folder.name, engine.checkpoint_mp_rank, replica, engine.bfloat16_enabled()
            )
            for replica in range(num_replicas)
        ]
        for path in paths:
            if not Path(path).is_file():
                raise _MismatchError(f"{path} is missing")
        return [self._load(path)["optimizer_state_dict"] for path in paths]

    def _give_rates_to_heads(self) -> None:
        """A scheduler has a rate for each group, and that of a group of heads is not in the checkpoint."""
        scheduler = self.engine.lr_scheduler
        for name, rates in self._rates.items():
            loaded = getattr(scheduler, name)
            setattr(scheduler, name, [*loaded, *rates[len(loaded) :]])
        if self._optimizer_state is None or not self.with_scheduler:
            return
        if hasattr(scheduler, "last_batch_iteration"):  # DeepSpeed's
            for number, rate in enumerate(scheduler.get_lr()):
                if number not in self._groups:
                    self.engine.optimizer.param_groups[number]["lr"] = rate


class _MismatchError(Exception):
    """Why the state of the optimizer does not fit."""


def _state(engine: DeepSpeedSide, saved: State | None, *, is_flat: bool) -> tuple[State, list[int]]:
    """The state of torch's optimizer for its parameters now, from one that has numbers in place of names.

    Also the numbers of the groups that it is for.
    """
    if is_flat or (saved and BASE_OPTIMIZER_STATE in saved):
        raise _MismatchError("it was saved in bf16 or with ZeRO, this job is in float32 without ZeRO")
    if not saved:
        raise _MismatchError("there is none")
    groups, theirs = engine.optimizer.param_groups, saved["param_groups"]
    ours = _groups_of_layers(engine, [len(group["params"]) for group in theirs])
    numbers = {id(p): n for n, p in enumerate(p for group in groups for p in group["params"])}
    state, options = {}, dict(zip(ours, theirs, strict=True))
    for number, group in options.items():
        for parameter, old in zip(ours[number], group["params"], strict=True):
            of_old = saved["state"].get(old, {})
            shapes = [v.shape for v in of_old.values() if isinstance(v, Tensor) and v.dim()]
            if shapes and parameter.shape not in shapes:
                wrong, expected = list(shapes[0]), list(parameter.shape)
                raise _MismatchError(f"it is for a parameter of shape {wrong}, not {expected}")
            if of_old and id(parameter) in numbers:
                state[numbers[id(parameter)]] = of_old
    listed = [
        {**group, **options.get(number, {}), "params": [numbers[id(p)] for p in group["params"]]}
        for number, group in enumerate(groups)
    ]
    return {"state": state, "param_groups": listed}, list(options)


def _groups_of_layers(engine: DeepSpeedSide, sizes: list[int]) -> dict[int, list[nn.Parameter]]:
    """The parameters of layers in each group of the optimizer that has some; as many as ``sizes`` says."""
    layers = engine.module.layer_parameters(frozen=True)
    ids = set(map(id, layers))
    groups = enumerate(engine.optimizer.param_groups)
    of_layers = {number: [p for p in group["params"] if id(p) in ids] for number, group in groups}
    of_layers = {number: parameters for number, parameters in of_layers.items() if parameters}
    if len(of_layers) <= 1 and sizes == [len(layers)]:
        return {max(of_layers, default=0): layers}  # DeepSpeed lists frozen ones too
    expected = [len(parameters) for parameters in of_layers.values()]
    if sizes != expected:
        raise _MismatchError(f"its groups have {sizes} parameters, those of this stage's layers {expected}")
    return of_layers


@dataclass
class _Saved:
    """What a checkpoint has of one parameter, flat: its value, tensors like it, and numbers of its group."""

    tensors: dict[str, list[Tensor]]
    numbers: State
    group: int
    options: State

    def whole(self, key: str) -> Tensor:
        return torch.cat(self.tensors[key])


def _by_name(parts: Sequence[State]) -> dict[str, _Saved]:
    """The parameters in flat copies, put together from the parts of all replicas."""
    found: dict[str, _Saved] = {}
    for part in parts:
        base = part.get(BASE_OPTIMIZER_STATE)
        if not isinstance(base, dict) or PARAM_SLICE_MAPPINGS not in part:
            raise _MismatchError("it has no names, as with zero_optimization.elastic_checkpoint")
        for number, names in enumerate(part[PARAM_SLICE_MAPPINGS]):
            group = base["param_groups"][number]
            state = base["state"].get(group["params"][0], {})
            flat = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() == 1}
            flat[_FP32] = part[SINGLE_PARTITION_OF_FP32_GROUPS][number].detach()
            for name, place in names.items():
                numbers = {key: value for key, value in state.items() if key not in flat}
                saved = found.setdefault(name, _Saved({}, numbers, number, group))
                for key, tensor in flat.items():
                    saved.tensors.setdefault(key, []).append(tensor.narrow(0, place.start, place.numel))
    return found


def _flat_state(engine: DeepSpeedSide, saved: Mapping[str, _Saved]) -> tuple[State, list[int]]:
    """The state of DeepSpeed's optimizer as it is, with the values of layers replaced by saved ones.

    Also the numbers of the groups that have some.
    """
    _check_names(engine, saved)
    optimizer, module = engine.optimizer, engine.module
    own: State = optimizer.state_dict()
    masters = [flat.detach().clone() for flat in own[SINGLE_PARTITION_OF_FP32_GROUPS]]
    states: dict[int, State] = {}
    groups: dict[int, int] = {}
    listed = []
    for number, group in enumerate(optimizer.optimizer.param_groups):
        options: State = {}
        whole = {_FP32: masters[number]}
        for name, place in own[PARAM_SLICE_MAPPINGS][number].items():
            if name not in saved:
                continue
            options, state = saved[name].options, states.setdefault(number, dict(saved[name].numbers))
            if groups.setdefault(number, saved[name].group) != saved[name].group:
                raise _MismatchError(f"{name} is in another group of parameters")
            first = module.get_parameter(name)._hp_mapping.lp_fragment_address.start
            for key in saved[name].tensors:
                if key not in whole:
                    whole[key] = state[key] = torch.zeros_like(group["params"][0])
                piece = saved[name].whole(key).narrow(0, first, place.numel)
                whole[key].narrow(0, place.start, place.numel).copy_(piece)
        listed.append({**group, **options, "params": [number]})
    if len(set(groups.values())) < len(groups):
        raise _MismatchError("it has fewer groups of parameters")
    own[BASE_OPTIMIZER_STATE] = {"state": states, "param_groups": listed}
    own[SINGLE_PARTITION_OF_FP32_GROUPS] = masters
    return own, list(groups)


def _check_names(engine: DeepSpeedSide, saved: Mapping[str, _Saved]) -> None:
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for parameter in engine.module.layer_parameters(frozen=True):
        of_it = saved.get(names[id(parameter)])
        if parameter.requires_grad and (of_it is None or of_it.whole(_FP32).numel() != parameter.numel()):
            raise _MismatchError(f"it has no {names[id(parameter)]} of {parameter.numel()} values")
