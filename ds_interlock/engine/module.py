"""``InterlockPipelineModule``: a ``PipelineModule`` with a gradient-flow plan and loss heads.

Layers, partitioning and parameter names are DeepSpeed's. Added are the plan or a schedule of plans, the heads
of this stage, a forward over a range of layers, and what becomes of tied weights and of process groups that
span the pipe when stages step on their own.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.utils import set_random_seed
from deepspeed.utils import logger
from torch import nn

from ds_interlock.config import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.heads.factory import AuxiliaryHead, head_factory
from ds_interlock.heads.output_layers import look_at
from ds_interlock.schedule.dependency import num_backward_passes
from ds_interlock.schedule.phases import PlanSchedule
from ds_interlock.schedule.plan import GradientFlowPlan, rises
from ds_interlock.stage.heads import Heads, MakeHead, build_head
from ds_interlock.stage.hidden import Hidden
from ds_interlock.stage.recomputation import recomputed
from ds_interlock.stage.shared_readout import Source, Weights
from ds_interlock.stage.walks import compare_walks, modules_of
from ds_interlock.transport.copies import Copies

# DeepSpeed's default, and what it replaces it with under "pipeline": {"use_reentrant": false}.
_CHECKPOINTS = (checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint)


class StageGrid:
    """DeepSpeed's grid of process groups, as seen by a stage that steps on its own.

    DeepSpeed clips gradients and looks for overflow over this group, which spans the pipe.
    """

    def __init__(self, grid: Any, steps_alone: Callable[[], bool]) -> None:
        self._grid = grid
        self._steps_alone = steps_alone

    def get_model_parallel_group(self) -> Any:
        """The ranks that step together: the pipe's, or the tensor-parallel ones of this stage."""
        grid = self._grid
        return grid.get_slice_parallel_group() if self._steps_alone() else grid.get_model_parallel_group()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


class InterlockPipelineModule(PipelineModule):
    """A model as a sequence of layers, cut into pipeline stages with losses of their own.

    ``interlock`` is its mode, which ``ds_interlock.initialize`` binds at the latest.

    Args:
        layers: As ``PipelineModule``: ``LayerSpec``, ``TiedLayerSpec``, modules, callables.
        interlock: The mode. If None, ``ds_interlock.initialize`` takes it from its config.
        head: Builds an auxiliary head, a module that maps the hidden state to what the last layer
            would output. If None, heads are made as ``interlock.head`` says.
        pretrained: Whether layers bring trained weights: heads of type ``auto`` are then lenses.
        plan: Makes the plan, or a schedule of plans, from the stage bounds, in place of what ``interlock``
            means: for gradient flows that the configuration has no words for, as deep supervision.
        stage_bounds: Where to cut, in place of a ``partition_method``: stage k gets the layers
            ``stage_bounds[k] .. stage_bounds[k + 1] - 1``.
        *positional, **pipeline: The other arguments of ``PipelineModule``, in its order or by name.

    Raises:
        ConfigError: If stages, layers and configuration do not fit together.
    """

    def __init__(
        self,
        layers: Any,
        *positional: Any,
        interlock: InterlockConfig | None = None,
        head: MakeHead | None = None,
        pretrained: bool = False,
        plan: Callable[[list[int]], GradientFlowPlan | PlanSchedule] | None = None,
        stage_bounds: Sequence[int] | None = None,
        **pipeline: Any,
    ) -> None:
        layers = list(layers)
        pipeline = inspect.signature(PipelineModule).bind_partial(layers, *positional, **pipeline).arguments
        topology = pipeline.get("topology")
        num_stages = topology.get_dim("pipe") if topology else pipeline.get("num_stages")
        if stage_bounds is not None:
            if pipeline.get("partition_method") is not None:
                raise ConfigError("got both stage_bounds and partition_method: leave out one of them")
            pipeline["partition_method"] = _checked_bounds(stage_bounds, len(layers), num_stages)
        if num_stages and num_stages > len(layers):
            raise ConfigError(f"{num_stages} stages for {len(layers)} layers: use num_stages={len(layers)}")
        if pipeline.get("activation_checkpoint_func", _CHECKPOINTS[0]) not in _CHECKPOINTS:
            raise ConfigError(
                "activation_checkpoint_func: activations are recomputed by torch.utils.checkpoint, without "
                "re-entrance, since a stage needs more than one backward pass; leave the function out"
            )
        super().__init__(**pipeline)
        self.make_head = head
        self._pretrained = pretrained
        self._make_plan = plan
        self.keeps_ties = False
        self.phase = 0
        if not rises(self.parts):
            raise ConfigError(
                f'partition_method "{pipeline.get("partition_method", "parameters")}" leaves a stage without '
                f'layers: {list(self.parts)}; use partition_method="uniform" or fewer stages'
            )
        self.heads = Heads()
        self.copies: Copies | None = None
        """What shared readouts read with; set by the engine."""
        self.placeholder: nn.Parameter | None = None
        if interlock is not None:
            self.bind(interlock)

    def bind(self, interlock: InterlockConfig) -> None:
        """Makes the plans and builds this stage's heads, once."""
        bound = getattr(self, "interlock", interlock)
        if bound != interlock:
            raise ConfigError(
                'the "interlock" section of the config differs from the one that InterlockPipelineModule was '
                f"built with: {interlock!r} is not {bound!r}; read both from the same file"
            )
        if hasattr(self, "interlock"):
            return
        bounds = [int(bound) for bound in self.parts]
        plan = (self._make_plan or interlock.plan_schedule)(bounds)
        self.schedule = plan if isinstance(plan, PlanSchedule) else PlanSchedule.constant(plan)
        planned = list(self.schedule.stage_bounds)
        if planned != bounds:
            raise ConfigError(f"plan({bounds}) returned {planned}: it must keep the bounds it is given")
        self.interlock = interlock
        self.head_config = interlock.head.resolve(pretrained=self._pretrained)
        make_head = self.make_head
        if make_head is None and self.schedule.heads and self.loss_fn is None:
            raise ConfigError(
                "loss_fn is None, so the last layer returns the loss, which heads made as interlock.head "
                "says cannot do: pass heads that return a loss as it does (head=make_head), or "
                'a loss_fn; mode "global" needs neither'
            )
        if make_head is None and self.schedule.heads:
            # On every rank, also where there is no head: a model it cannot size one for is refused by all.
            make_head = head_factory(interlock.head, self._layer_specs, self._pretrained)
        for number, position in enumerate(self.schedule.heads):
            if position.stage == self.stage_id:
                assert make_head is not None
                built = build_head(make_head, number, position, self.base_seed)
                self.heads.add(number, position, built.to(get_accelerator().device_name(self.local_rank)))
        self._settle_tied_weights(interlock)

    @property
    def plan(self) -> GradientFlowPlan:
        """The gradient-flow plan in force: that of the phase with the number ``phase``."""
        return self.schedule.phases[self.phase].plan

    @property
    def steps_alone(self) -> bool:
        """Whether a stage's update depends on its window only; the same on all stages."""
        return self.interlock.steps_alone(self.plan, tied=self.keeps_ties)

    def mpu(self) -> Any:
        """The process groups, as DeepSpeed's optimizers use them."""
        if self.schedule.is_end_to_end or self.keeps_ties:
            return self._grid
        return StageGrid(self._grid, lambda: self.steps_alone)

    def unused_phases(self, head: int) -> tuple[int, ...]:
        """The phases in which the head with this number takes no part."""
        phases = range(len(self.schedule.phases))
        return tuple(phase for phase in phases if self.schedule.is_idle(head, phase))

    def head_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of this stage's heads that no layer has too."""
        of_layers = set(map(id, self.layer_parameters()))
        return [p for p in self.heads.parameters() if p.requires_grad and id(p) not in of_layers]

    def layer_parameters(self, *, frozen: bool = False) -> list[nn.Parameter]:
        """The trainable parameters of this stage's layers; the ``frozen`` ones too if asked for."""
        layers = (child for child in self.children() if child is not self.heads)
        parameters = dict.fromkeys(p for layer in layers for p in layer.parameters())
        return [p for p in parameters if p.requires_grad or frozen]

    def tied_layers(self, key: str) -> list[int]:
        """The numbers of the layers that share the tied module ``key``."""
        specs = enumerate(self._layer_specs)
        return [index for index, spec in specs if isinstance(spec, TiedLayerSpec) and spec.key == key]

    def live_weights(self, source: Source) -> Weights:
        """The weights at ``source``, which must be in this stage, as they are trained."""
        spec = self._layer_specs[source.layer]
        if isinstance(spec, TiedLayerSpec):
            return source.weights_in(self.tied_modules[spec.key])
        return source.weights_in(self.forward_funcs[source.layer - self._local_start])

    def add_placeholder(self) -> None:
        """Gives a stage in which nothing learns, in some phase, a parameter that nothing depends on.

        Every stage needs an optimizer, and DeepSpeed's refuse an empty list. Call it once layers are frozen.
        """
        if self.layer_parameters():
            return
        for phase in self.schedule.phases:
            heads = self.heads.by_loss(phase.plan, self.stage_id).values()
            if not any(parameter.requires_grad for head in heads for parameter in head.parameters()):
                self.placeholder = nn.Parameter(torch.zeros(1))

    def get_tied_weights_and_groups(self) -> list[Any]:
        """As DeepSpeed's, of weights that have gradients to be summed: frozen ones have none."""
        return [tie for tie in super().get_tied_weights_and_groups() if tie[0].requires_grad]

    def _synchronize_tied_weights(self) -> None:
        with torch.no_grad():  # as a broadcast that autograd saw, it would be part of every backward pass
            super()._synchronize_tied_weights()

    def begin_micro_batch(self) -> None:
        """Moves the offset from which ``seed_layers`` seeds the layers, as DeepSpeed does."""
        self.micro_offset += 1

    def run_layers(self, hidden: Hidden, start: int, stop: int) -> Hidden:
        """Applies the layers ``start .. stop - 1``, counted over the whole model.

        Otherwise as ``PipelineModule.forward``, with its ``activation_checkpoint_interval``, at which it
        takes a tensor out of a tuple of one.
        """
        first, last = start - self._local_start, stop - self._local_start
        interval = self.activation_checkpoint_interval
        if interval == 0:
            return self._run_local(first, last, self.micro_offset + 1, hidden)
        for begin in range(first, last, interval):
            hidden = _unwrapped(hidden)
            end = min(begin + interval, last)
            run = partial(self._run_local, begin, end, self.micro_offset + 1)
            functions = self.forward_funcs[begin:end]
            if not self._is_checkpointable(functions):
                hidden = run(hidden)
            elif torch.is_grad_enabled():
                hidden = _unwrapped(recomputed(run, hidden, modules_of(functions)))
            else:
                hidden = _unwrapped(run(hidden))
        return hidden

    def check_walks(self, hidden: Hidden) -> None:
        """Refuses layers of this stage whose gradients change when their graph is walked again, as it is.

        ``hidden`` is what the stage starts from. Parameters, ``.grad`` and buffers stay as they are.

        Raises:
            ConfigError: If a kernel's backward pass overwrites what it saved.
        """
        walks = max(num_backward_passes(phase.plan, self.stage_id) for phase in self.schedule.phases)
        if walks == 1:
            return
        for local, function in enumerate(self.forward_funcs):
            layer = local + self._local_start
            run = partial(self.run_layers, start=layer, stop=layer + 1)
            hidden, error, functions = compare_walks(run, hidden, modules_of([function]))
            if not error <= 1:
                kind = type(getattr(function, "args", (function,))[0]).__name__
                raise ConfigError(
                    f"layer {layer} ({kind}) gives other gradients when its graph is walked back again, and "
                    f"stage {self.stage_id} walks back {walks} times, for relays and weights: the backward "
                    f"pass of {functions or 'an operation'} changes what its forward saved; use another "
                    'kernel, or "interlock": {"mode": "local"} or "global", which walk once'
                )

    def let_heads_return_what_the_model_does(self) -> None:
        """No tuple of one where the last layer is recomputed. Call it once the interval is settled."""
        interval = self.activation_checkpoint_interval
        heads = [head for head in self.heads.values() if isinstance(head, AuxiliaryHead) and head.in_tuple]
        if interval == 0 or not heads:
            return
        start, stop = self.parts[-2:]
        last = self._layer_specs[start + (stop - start - 1) // interval * interval : stop]
        functions = [getattr(spec, "forward_fn", None) or look_at(spec, "the last layer") for spec in last]
        if self._is_checkpointable(functions):
            for head in heads:
                head.in_tuple = False

    def _partition_layers(self, method: str | list[int] = "uniform") -> None:
        """As DeepSpeed's, by the name of a method; or at these bounds."""
        if isinstance(method, str):
            super()._partition_layers(method)
            return
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = method
        self._set_bounds(start=method[stage], stop=method[stage + 1])

    def _run_local(self, begin: int, end: int, micro_offset: int, hidden: Hidden) -> Hidden:
        """Local layers ``begin .. end - 1``; a recomputation must see the offset of its forward."""
        for index in range(begin, end):
            if self.seed_layers:
                self.curr_layer = index + self._local_start
                seed = self.base_seed * micro_offset + self.curr_layer
                (self.seed_fn or set_random_seed)(seed)
            hidden = self.forward_funcs[index](hidden)
        return hidden

    def _settle_tied_weights(self, interlock: InterlockConfig) -> None:
        """Ties across stages need an all-reduce over the pipe at every step: keep it, or cut them."""
        stages: dict[str, set[int]] = {}
        for number, spec in enumerate(self._layer_specs):
            if isinstance(spec, TiedLayerSpec):
                stages.setdefault(spec.key, set()).add(self.stage_owner(number))
        across = sorted(key for key, of_key in stages.items() if len(of_key) > 1)
        if not across or self.schedule.is_end_to_end:
            return
        names = ", ".join(map(repr, across))
        if interlock.tied_weights == "error":
            raise ConfigError(
                f'weights {names} are tied across stages, and interlock.tied_weights is "error": use '
                '"untie" (each stage trains its own copy) or "sync" (all-reduce at every step, no streaming)'
            )
        if interlock.tied_weights == "sync":
            self.keeps_ties = True
            message = f"tied weights {names} stay tied: their all-reduce ends streaming across batches"
        else:
            message = f"tied weights {names} are untied: equal at first, then each stage trains its own copy"
            self.tied_comms: dict[str, Any] = {}
            for parameter in self.tied_modules.parameters():
                parameter.ds_pipe_replicated = False
        if self.global_rank == 0:
            logger.info("interlock: %s (interlock.tied_weights)", message)


def _unwrapped(hidden: Hidden) -> Hidden:
    return hidden[0] if isinstance(hidden, tuple) and len(hidden) == 1 else hidden


def _checked_bounds(stage_bounds: Sequence[int], num_layers: int, num_stages: int | None) -> list[int]:
    bounds = [int(bound) for bound in stage_bounds]
    if not rises(bounds) or bounds[:1] != [0] or bounds[-1:] != [num_layers]:
        raise ConfigError(f"stage_bounds {bounds}: expected rising numbers from 0 to {num_layers}")
    if num_stages and len(bounds) != num_stages + 1:
        raise ConfigError(f"stage_bounds {bounds}: expected {num_stages + 1} numbers for {num_stages} stages")
    return bounds


__all__ = ["InterlockPipelineModule", "LayerSpec", "TiedLayerSpec"]
