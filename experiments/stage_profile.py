"""What the stages of an experiment's model cost, measured here; and a pipeline whose stages sleep as long.

Every layer is timed by itself, with its arguments in the whole model: forward, input gradient, weight
gradient; then the final loss and the auxiliary heads. Costs are in *units*: one is the mean forward of a
stage for a micro-batch.

The pipeline is a real one: every stage is a process with our engine, and all work at once, however few
cores there are, since sleeping needs none. The time of a batch is then that of the schedule, the engine and
the model's proportions.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_interlock import InterlockConfig
from ds_interlock.config import HeadConfig
from ds_interlock.heads.output_layers import first_tensor
from ds_interlock.planning.forecast import play
from ds_interlock.planning.profile import HeadProfile, LayerProfile, Profile, balanced_bounds
from ds_interlock.planning.zero_bubble import zero_bubble_batches
from ds_interlock.profiling.layers import Stopwatch, loss_seconds, profile_layers
from ds_interlock.profiling.model import calls_in_sequence
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.heads import build_head
from experiments.tasks import Task
from measuring.engines import Workload, make_engine, run_ranks, seconds_of_a_batch
from measuring.sleeping import sleeping_workload
from measuring.torch_pipeline import TorchPipeline

NUM_ROUNDS = 50
"""How often everything is timed; medians count."""

PASSES = ("forward_seconds", "input_gradient_seconds", "weight_gradient_seconds")

LEARNING_KEYS = {"weight", "learning_rate_scale", "warmup_steps", "warmup_learning_rate", "refresh_every"}
"""Keys of a head's section for how it learns, on which its time does not depend."""


@dataclass(frozen=True)
class StagedModel:
    """A model that is cut into stages; all costs are in units, those of auxiliary heads are left out."""

    stage_bounds: tuple[int, ...]
    layers: tuple[LayerProfile, ...]
    loss: float
    """The final loss, forward and backward, on the last stage."""

    def costs(self, heads: Mapping[int, float]) -> CostModel:
        """For the simulator; ``heads`` are the units of auxiliary heads by their ``after_layer``."""
        head, loss = HeadProfile(type="", seconds=0.0), self.loss
        profile = Profile(model="", device="", source="", layers=self.layers, head=head, loss_seconds=loss)
        of_stages = [0.0] * (len(self.stage_bounds) - 1)
        for after_layer, units in heads.items():
            of_stages[bisect_left(self.stage_bounds, after_layer) - 1] = units
        return replace(profile.cost_model(self.stage_bounds), head=of_stages)

    def zb_h1(self, num_micro_batches: int) -> float:
        """A batch of global mode under ZB-H1 according to the simulator, in units."""
        plan = GradientFlowPlan.end_to_end(stage_bounds=self.stage_bounds)
        return zero_bubble_batches(plan, num_micro_batches, self.costs({}), num_batches=1).batch_seconds

    def zbv_seconds(self, micro_batches: Sequence[int], unit_seconds: float) -> dict[int, float]:
        """Measured seconds of a batch of global mode under torch's ZBV; empty if it has too few layers."""
        num_stages = len(self.stage_bounds) - 1
        if len(self.layers) < 2 * num_stages:
            return {}
        how = {"model": self, "unit_seconds": unit_seconds, "micro_batches": micro_batches}
        return dict(run_ranks(_measure_zbv, num_stages, **how)[0])


class TaskProfile:
    """The costs of a task's layers and loss on its first micro-batch, and of heads once they are asked for.

    ``unit_seconds`` is a unit on this machine; ``heads`` are units by configuration and ``after_layer``.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.heads: dict[tuple[HeadConfig, int], float] = {}
        self.stopwatch = Stopwatch(lambda: None, NUM_ROUNDS)  # the CPU is idle whenever a call returns
        inputs, labels = task.batch(0)[0]
        calls = calls_in_sequence(task.layers, first_tensor(inputs))
        profiles = profile_layers(calls, self.stopwatch, None)
        outputs = first_tensor(task.layers[-1](*calls[-1].inputs))
        loss = loss_seconds(lambda outputs: task.loss_fn(outputs, labels), outputs, self.stopwatch)
        unit = sum(layer.forward_seconds for layer in profiles) / (len(task.stage_bounds) - 1)
        first, *others = (
            LayerProfile(name=layer.name, **{name: getattr(layer, name) / unit for name in PASSES})
            for layer in profiles
        )
        first = first.model_copy(update={"input_gradient_seconds": 0.0})  # its input is data
        self.model = StagedModel(tuple(task.stage_bounds), (first, *others), loss / unit)
        self.unit_seconds = unit

    def heads_of(self, section: InterlockConfig) -> dict[int, float]:
        """The cost of every auxiliary head of ``section`` by its ``after_layer``, both passes.

        A head is timed once for all sections that have it.
        """
        positions = section.plan(self.model.stage_bounds).heads[:-1]
        config = without_learning(section.head)
        for number, position in enumerate(positions):
            if (config, position.after_layer) not in self.heads:
                head = build_head(self.task.heads(section), number, position)
                self.heads[config, position.after_layer] = self._head_units(head, position.after_layer)
        return {place.after_layer: self.heads[config, place.after_layer] for place in positions}

    def _head_units(self, head: Any, after_layer: int) -> float:
        inputs, labels = self.task.batch(0)[0]
        layers, loss_fn = self.task.layers[: after_layer + 1], self.task.loss_fn
        hidden = first_tensor(calls_in_sequence(layers, first_tensor(inputs))[after_layer].inputs)

        def loss(hidden: Tensor) -> Tensor:
            own = hasattr(head, "loss")
            value: Tensor = head.loss(hidden, labels, loss_fn) if own else loss_fn(head(hidden), labels)
            return value

        return loss_seconds(loss, hidden, self.stopwatch) / self.unit_seconds


def without_learning(head: HeadConfig) -> HeadConfig:
    """The part of a head's section that its time depends on."""
    return HeadConfig(**head.resolve(pretrained=False).model_dump(exclude=LEARNING_KEYS))


@dataclass(frozen=True)
class Pipeline:
    """A model in a mode; its costs are in units, those of auxiliary heads by their ``after_layer``."""

    interlock: InterlockConfig
    model: StagedModel
    heads: dict[int, float]

    def seconds(self, micro_batches: Sequence[int], unit_seconds: float) -> dict[int, float]:
        """Measured seconds of a batch by its number of micro-batches; units sleep ``unit_seconds``."""
        how = {"pipeline": self, "unit_seconds": unit_seconds, "micro_batches": micro_batches}
        return dict(run_ranks(_measure, len(self.model.stage_bounds) - 1, **how)[0])

    @classmethod
    def asynchronous(cls, model: StagedModel) -> "Pipeline":
        """An asynchronous pipeline at work: no stage waits, as under local, and there are no heads.

        Its gradients travel upstream, which takes no stage's time.
        """
        return cls(InterlockConfig(mode="local"), model, defaultdict(float))

    def predicted(self, num_micro_batches: int) -> float:
        """A batch according to the simulator, in units; the engine itself needs no time there."""
        costs, bounds = self.model.costs(self.heads), self.model.stage_bounds
        return play(self.interlock, costs, bounds, num_micro_batches, num_batches=10)[1].batch_seconds


def _measure(pipeline: Pipeline, unit_seconds: float, micro_batches: Sequence[int]) -> dict[int, float]:
    """On every rank of a job: seconds of a batch, by its number of micro-batches."""
    model = pipeline.model
    work = _sleeping(model, unit_seconds, pipeline.heads, model.stage_bounds)
    # A head sleeps whatever its section is; fitting it first, and measuring during training, only takes time.
    section = pipeline.interlock.model_dump(exclude={"head", "trace", "myopia"}, exclude_defaults=True)
    return _seconds(make_engine(work, section), work, micro_batches)


def _measure_zbv(model: StagedModel, unit_seconds: float, micro_batches: Sequence[int]) -> dict[int, float]:
    """The same under torch's ZBV, with two parts of about the same length on every rank."""
    layers = [sum(getattr(layer, name) for name in PASSES) for layer in model.layers]
    halves = balanced_bounds([*layers[:-1], layers[-1] + model.loss], 2 * dist.get_world_size())
    work = _sleeping(model, unit_seconds, {}, halves)
    return _seconds(TorchPipeline("torch ZBV", work), work, micro_batches)


def _sleeping(
    model: StagedModel, unit_seconds: float, heads: Mapping[int, float], stage_bounds: Sequence[int]
) -> Workload:
    return sleeping_workload(
        [[unit_seconds * getattr(layer, name) for name in PASSES] for layer in model.layers],
        lambda position: unit_seconds * heads[position.after_layer],
        unit_seconds * model.loss,
        stage_bounds,
    )


def _seconds(engine: Any, work: Workload, micro_batches: Sequence[int]) -> dict[int, float]:
    # 16 micro-batches, as far as 3 to 8 batches make them.
    return {m: seconds_of_a_batch(engine, work, m, min(max(16 // m, 3), 8)) for m in micro_batches}
