"""Checkpoints whose state is found by name, or is not all there.

    layer_00-model_states.pt ...              layers, loaded by DeepSpeed
    mp_rank_00_model_states.pt ...            one file per stage: counters, scheduler; the optimizer's state,
    ..._pp_rank_0_mp_rank_00_optim_states.pt  or under ZeRO one file per rank with its part of it
    interlock_stage_00.pt ...                 ours: heads, untied copies of tied modules, plan, topology
    interlock_rank_00000.pt ...               ours: data position; in bf16 without ZeRO the optimizer's state

DeepSpeed or a converter wrote it, or this package under another plan or with other numbers of stages and
replicas. Everything is read and compared before anything is loaded. Heads that are not in it start anew.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.utils import logger, safe_set_full_fp32_param
from torch import distributed as dist
from torch import nn

from ds_interlock.checkpoints.optimizer import (
    Groups,
    MismatchError,
    Saved,
    State,
    from_flat,
    from_torch,
    to_flat,
    to_torch,
)
from ds_interlock.checkpoints.stages import SavedStages, fits, read_file
from ds_interlock.engine.checkpoint import Checkpoints, Loaded, load_flat_copies
from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.errors import ConfigError
from ds_interlock.transport.agreement import gather, raised_by_all

_TORCHS, _FLAT = "float32 without ZeRO", "bf16 or with ZeRO"
_OTHER_FORM = "it was saved in {}, this job is in {}"


@dataclass
class MappedCheckpoint(ABC):
    """One checkpoint to load, or what is wanted of it."""

    engine: DeepSpeedSide
    checkpoints: Checkpoints
    folder: Path
    module_only: bool
    with_optimizer: bool
    with_scheduler: bool
    _optimizer_state: State | None = None
    _groups: Groups = field(default_factory=dict)
    """Those of the optimizer that it is for; the others are of heads."""
    _rates: dict[str, list[float]] = field(default_factory=dict)
    _models: dict[int, State] = field(default_factory=dict)
    """DeepSpeed's files, by saved stage, of those with something for this one."""
    has_new_heads: bool = True

    def load(self, deepspeed_loads: Callable[..., Loaded], strict: bool) -> Loaded:
        """Loads what is wanted of it, layers and counters with ``deepspeed_loads``; returns what that does.

        Raises:
            ConfigError: On all ranks, if something is missing or does not fit. Nothing has been loaded then.
        """
        with raised_by_all():
            self._check_layers()
            copies = [*self._untied_copies(), *self._heads()]
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
            self._give_rates()
        self._finish()
        return result

    @abstractmethod
    def _heads(self) -> list[tuple[nn.Module, State]]:
        """This stage's heads that are in it, with their states."""

    @abstractmethod
    def _stages(self) -> list[int]:
        """The saved stages with something for this one; ConfigError if they cannot be mapped."""

    @abstractmethod
    def _saved_optimizer(self) -> Saved:
        """The optimizer's state by name, from ``_models`` and the files beside them."""

    @abstractmethod
    def _finish(self) -> None:
        """Loads what else is in it, and says what is not."""

    @property
    def _loaded(self) -> str:
        return "layers" if self._optimizer_state is None else "layers and their optimizer state"

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
        module = self.engine.module
        tied = {} if module.tied_comms else module.tied_modules
        return [(tied_module, self._tied_state(key)) for key, tied_module in tied.items()]

    def _tied_state(self, key: str) -> State:
        module = self.engine.module
        tied = module.tied_layers(key)
        whole = [index for index in tied if module._layer_specs[index].forward_fn is None]
        files = [file for index in whole for file in self._files_of_layer(index - module._local_start)]
        if not files:
            raise ConfigError(
                f"{self.folder} has no file with the tied module {key!r}: DeepSpeed saves it with a "
                "layer of it that has no forward_fn"
            )
        return self._load(files[0])

    def _load(self, path: str | Path) -> State:
        state: State = self.engine.checkpoint_engine.load(str(path), map_location="cpu")
        return state

    def _read_optimizer(self) -> None:
        engine, module = self.engine, self.engine.module
        for stage in self._stages():
            name = Path(engine._get_ckpt_name(str(self.folder.parent), self.folder.name)).name
            own = f"mp_rank_{engine.checkpoint_mp_rank:02d}"
            self._models[stage] = self._load(self.folder / name.replace(own, f"mp_rank_{stage:02d}"))
            if self.with_scheduler and engine.lr_scheduler and not self._models[stage].get("lr_scheduler"):
                raise ConfigError(f"{self.folder} has no scheduler state: use load_lr_scheduler_states=False")
        self._rates = {
            name: list(getattr(engine.lr_scheduler, name))
            for name in ("base_lrs", "_last_lr")
            if isinstance(getattr(engine.lr_scheduler, name, None), list)
        }
        if not self.with_optimizer or engine.optimizer is None:
            return
        parameters = dict(module.named_parameters())
        ids = set(map(id, module.layer_parameters()))
        layers = {name for name, parameter in parameters.items() if id(parameter) in ids}
        put_into = to_flat if isinstance(engine.optimizer, ZeROOptimizer) else to_torch
        try:
            saved = self._saved_optimizer()
            self._optimizer_state, self._groups = put_into(engine.optimizer, parameters, layers, saved)
        except MismatchError as error:
            raise ConfigError(
                f"{self.folder}: cannot take the optimizer state of stage {module.stage_id}: {error}. Use "
                "load_checkpoint(..., load_optimizer_states=False), or load_module_only=True"
            ) from error

    def _give_rates(self) -> None:
        """A scheduler has a rate for each group, and those of new heads are not in the checkpoint."""
        scheduler = self.engine.lr_scheduler
        for name, rates in self._rates.items() if self.with_scheduler else ():
            loaded = getattr(scheduler, name)
            loaded = [*loaded, *rates[len(loaded) :]][: len(rates)]
            for number, (stage, group) in self._groups.items():
                if name in self._models[stage]["lr_scheduler"]:
                    loaded[number] = self._models[stage]["lr_scheduler"][name][group]
            setattr(scheduler, name, loaded)
        if self._optimizer_state is None or not self.with_scheduler:
            return
        if hasattr(scheduler, "last_batch_iteration"):  # DeepSpeed's
            for number, rate in enumerate(scheduler.get_lr()):
                if number not in self._groups:
                    self.engine.optimizer.param_groups[number]["lr"] = rate


class DeepSpeedCheckpoint(MappedCheckpoint):
    """One without our files. In float32 without ZeRO it has no names: the order decides."""

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether ``folder`` holds one."""
        return any(folder.glob("layer_*-model_states.pt")) and not any(folder.glob("interlock_stage_*.pt"))

    def _heads(self) -> list[tuple[nn.Module, State]]:
        return []

    def _stages(self) -> list[int]:
        engine, num_files = self.engine, len(self._files_of_stages())
        if num_files != engine.mp_world_size:
            raise ConfigError(
                f"{self.folder} has {num_files} files mp_rank_*_model_states.pt, expected "
                f"{engine.mp_world_size}, one per stage and tensor-parallel rank: use as many stages, or "
                "load_checkpoint(..., load_module_only=True)"
            )
        return [engine.checkpoint_mp_rank]

    def _saved_optimizer(self) -> Saved:
        [(stage, saved)] = self._models.items()
        if isinstance(self.engine.optimizer, ZeROOptimizer):
            return from_flat(self._parts(saved), stage)
        if any(self.folder.glob("*_optim_states.pt")):
            raise MismatchError(_OTHER_FORM.format(_FLAT, _TORCHS))
        state: State | None = saved.get("optimizer")
        sizes = [len(group["params"]) for group in (state or {}).get("param_groups", [])]
        return from_torch(state, self._names_in_order(sizes), stage)

    def _parts(self, saved: State) -> list[State]:
        """What each replica keeps of the flat copies of this stage."""
        engine, folder, num_replicas = self.engine, self.folder, saved["dp_world_size"]
        if saved.get("optimizer"):
            if BASE_OPTIMIZER_STATE not in saved["optimizer"]:
                raise MismatchError(_OTHER_FORM.format(_TORCHS, _FLAT))
            if num_replicas > 1:
                raise MismatchError(
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
                raise MismatchError(f"{path} is missing")
        return [self._load(path)["optimizer_state_dict"] for path in paths]

    def _names_in_order(self, sizes: list[int]) -> list[list[str]]:
        """The names of layers in each group of the optimizer that has some; as many as ``sizes`` says."""
        module = self.engine.module
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        layers = [names[id(parameter)] for parameter in module.layer_parameters(frozen=True)]
        groups = [[names[id(p)] for p in group["params"]] for group in self.engine.optimizer.param_groups]
        of_layers = [[name for name in group if name in layers] for group in groups]
        of_layers = list(filter(None, of_layers))
        if len(of_layers) <= 1 and sizes == [len(layers)]:
            return [layers]  # DeepSpeed lists frozen ones too
        expected = [len(group) for group in of_layers]
        if sizes and sizes != expected:
            raise MismatchError(
                f"its groups have {sizes} parameters, those of this stage's layers {expected}"
            )
        return of_layers

    def _finish(self) -> None:
        module = self.engine.module
        heads = "; heads start anew" if module.schedule.heads else ""
        kind = module.head_config.type
        if heads and module.make_head is None and kind in ("lens", "shared") and module.copies is None:
            heads += f' (a "{kind}" has the output layers as it was built, not as in it: docs/heads.md)'
        self.checkpoints.restore_copies(None)
        if dist.get_rank() == 0:
            logger.warning(
                f"interlock: {self.folder} was not written by ds_interlock: loaded {self._loaded}{heads}; "
                "random state and data position are not in it (put the data iterator where it was)"
            )


class OtherShape(MappedCheckpoint):
    """One of ours, of another plan, or other numbers of stages or replicas."""

    @cached_property
    def _saved(self) -> SavedStages:
        return SavedStages(self.folder)

    @cached_property
    def _taken(self) -> dict[int, tuple[str, State]]:
        """The number and the saved state of this stage's heads that are in it, by the layers before them."""
        module, taken = self.engine.module, {}
        in_use, aside = self._saved.heads, self._saved.heads_aside
        for number, head in module.heads.items():
            after, like = module.schedule.heads[int(number)].after_layer, head.state_dict()
            for state in (in_use.get(after), aside.get(after)):
                if state is not None and after not in taken and fits(state, like):
                    taken[after] = number, state
        return taken

    def _heads(self) -> list[tuple[nn.Module, State]]:
        return [(self.engine.module.heads[number], state) for number, state in self._taken.values()]

    def _tied_owner(self, key: str) -> int:
        module = self.engine.module
        here = range(module._local_start, module._local_stop)
        return self._saved.owner(next(index for index in module.tied_layers(key) if index in here))

    def _tied_state(self, key: str) -> State:
        return self._saved.tied_module(key, self._tied_owner(key)) or super()._tied_state(key)

    def _stages(self) -> list[int]:
        module, states = self.engine.module, self._saved.states
        slices = [state.get("topology", {}).get("num_slices") for state in states]
        if set(slices) != {1} or self.engine.mp_world_size != module.num_stages:
            raise ConfigError(
                f"{self.folder} was saved under another plan or number of stages or replicas, "
                + ("by an earlier version" if None in slices else "with tensor parallelism")
                + ": use the same, or load_checkpoint(..., load_module_only=True)"
            )
        owners = set(map(self._saved.owner, range(module._local_start, module._local_stop)))
        return sorted(owners | set(map(self._tied_owner, module.tied_modules)))

    def _saved_optimizer(self) -> Saved:
        saved = {}
        for stage, model in self._models.items():
            for name, parameter in self._optimizer_of(stage, model).items():
                if here := self._name_here(name, stage):
                    saved[here] = parameter
        return saved

    def _optimizer_of(self, stage: int, model: State) -> Saved:
        topology = self._saved.states[stage]["topology"]
        kind, ranks = topology["optimizer"], topology["ranks"]
        is_flat = isinstance(self.engine.optimizer, ZeROOptimizer)
        if is_flat != (kind != "torch"):
            raise MismatchError(_OTHER_FORM.format(*((_TORCHS, _FLAT) if is_flat else (_FLAT, _TORCHS))))
        if kind == "torch":
            return from_torch(model["optimizer"], topology["names"], stage)
        if kind == "bf16":
            files = [self.folder / f"interlock_rank_{rank:05d}.pt" for rank in ranks]
            return from_flat([read_file(file)["optimizer"] for file in files], stage)
        names = [f"*zero_pp_rank_{part}_mp_rank_{stage:02d}_optim_states.pt" for part in range(len(ranks))]
        files = [file for name in names for file in self.folder.glob(name)]
        return from_flat([self._load(file)["optimizer_state_dict"] for file in files], stage)

    def _name_here(self, name: str, stage: int) -> str | None:
        """What the parameter is called now; None if it belongs to another copy, or to a lost head."""
        kind, _, rest = name.partition(".")
        key, _, rest = rest.partition(".")
        if kind == "heads":
            after = self._saved.position(key)
            number, state = self._taken.get(after, ("", None))  # it may be one kept aside
            return f"heads.{number}.{rest}" if state is self._saved.heads[after] else None
        is_other_copy = kind == "tied_modules" and (
            key not in self.engine.module.tied_modules or self._tied_owner(key) != stage
        )
        return None if is_other_copy else name

    def _finish(self) -> None:
        module, saved = self.engine.module, self._saved
        for after, (number, state) in self._taken.items():
            if state is saved.heads_aside.get(after):
                for parameter in module.heads[number].parameters():  # masters, where there are some
                    safe_set_full_fp32_param(parameter, parameter.detach().float())
        here = range(module._local_start + 1, module._local_stop + 1)
        self.checkpoints.heads_aside = {
            after: {name: tensor.clone() for name, tensor in state.items()}
            for after, state in (saved.heads_aside | saved.heads).items()
            if after in here and self._taken.get(after, ("", None))[1] is not state
        }
        module.micro_offset = saved.states[0]["micro_offset"]
        self.checkpoints.restore_copies(saved.copies)
        is_same_rank = self.checkpoints.is_where_it_was(saved.states)
        if not self.module_only:
            source = dist.get_rank() if is_same_rank else saved.states[0]["topology"]["ranks"][0]
            state = read_file(self.folder / f"interlock_rank_{source:05d}.pt")
            self.checkpoints.restore(state, random=is_same_rank)
        own = {head.after_layer for head in module.schedule.heads}
        taken = {after for of_rank in gather(list(self._taken)) for after in of_rank}
        self.has_new_heads = bool(own - taken)
        if dist.get_rank() == 0:
            self._say(own - taken, saved.heads.keys() - taken, is_same_rank=is_same_rank)

    def _say(self, new: Iterable[int], lost: Iterable[int], *, is_same_rank: bool) -> None:
        parts = [f"interlock: {self.folder} is of another plan or size: loaded {self._loaded}"]
        if new:
            parts.append(f"the heads after layers {sorted(new)} start anew")
        if lost:
            parts.append(f"those after layers {sorted(lost)} are kept aside, in the checkpoints of this run")
        if not is_same_rank and not self.module_only:
            parts.append("random state starts anew")
        logger.warning("; ".join(parts))
