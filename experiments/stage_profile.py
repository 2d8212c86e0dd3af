"""What the stages of an experiment's model cost beside each other, measured on this machine.

Every layer is timed by itself, with what it is called with in the whole model: forward, input gradient,
weight gradient; then the final loss, and every auxiliary head that is asked for.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_interlock import InterlockConfig
from ds_interlock.config import HeadConfig
from ds_interlock.profiling.layers import (
    Stopwatch,
    first_tensor,
    loss_seconds,
    profile_head,
    profile_layers,
)
from ds_interlock.profiling.model import calls_in_sequence
from ds_interlock.stage.in_process import build_head
from experiments.staged_model import LayerCosts, StagedModel
from experiments.tasks import Task

NUM_ROUNDS = 50
"""How often everything is timed; medians count."""

LEARNING_KEYS = {"weight", "learning_rate_scale", "warmup_steps", "warmup_learning_rate"}
"""What the section of a head says of how it learns, and its time does not depend on."""


@dataclass
class TaskProfile:
    """The costs of a task's model, and of its heads as they are asked for.

    Attributes:
        task: The model and its data.
        model: All costs but those of heads.
        unit_seconds: A unit on this machine: the mean forward of a stage for one micro-batch.
        heads: The costs of the heads that were asked for, in units, by configuration and ``after_layer``.
        num_rounds: How often everything is timed, after a first time that does not count.
    """

    task: Task
    model: StagedModel
    unit_seconds: float
    heads: dict[tuple[HeadConfig, int], float] = field(default_factory=dict)
    num_rounds: int = NUM_ROUNDS

    @classmethod
    def measure(cls, task: Task, num_rounds: int = NUM_ROUNDS) -> "TaskProfile":
        """Times layers and loss on the first micro-batch of the task.

        Args:
            task: A model and its data.
            num_rounds: See the class.
        """
        inputs, labels = task.batch(0)[0]
        calls = calls_in_sequence(task.layers, first_tensor(inputs))
        found = profile_layers(calls, _stopwatch(num_rounds), None)
        outputs = first_tensor(task.layers[-1](*calls[-1].inputs))
        seconds = loss_seconds(lambda outputs: task.loss_fn(outputs, labels), outputs, _stopwatch(num_rounds))
        unit = sum(layer.forward_seconds for layer in found) / (len(task.stage_bounds) - 1)
        layers = [
            LayerCosts(
                forward=layer.forward_seconds / unit,
                input_gradient=layer.input_gradient_seconds / unit if number else 0.0,
                weight_gradient=layer.weight_gradient_seconds / unit,
            )
            for number, layer in enumerate(found)
        ]
        model = StagedModel(tuple(task.stage_bounds), tuple(layers), seconds / unit)
        return cls(task, model, unit, num_rounds=num_rounds)

    def heads_of(self, section: InterlockConfig) -> dict[int, float]:
        """The cost of every auxiliary head of ``section`` by its ``after_layer``, in units.

        Forward, and backward to the head's weights and its input. A head is timed once for all sections that
        have it.
        """
        plan = section.plan(self.model.stage_bounds)
        config = without_learning(section.head)
        make_head = self.task.heads(section) if plan.heads[:-1] else None
        for loss, place in enumerate(plan.heads[:-1]):
            assert make_head is not None
            if (config, place.after_layer) not in self.heads:
                head = build_head(make_head, loss, place)
                self.heads[config, place.after_layer] = self._head_units(head, place.after_layer)
        return {place.after_layer: self.heads[config, place.after_layer] for place in plan.heads[:-1]}

    def _head_units(self, head: Any, after_layer: int) -> float:
        inputs, labels = self.task.batch(0)[0]
        front = self.task.layers[: after_layer + 1]
        hidden = first_tensor(calls_in_sequence(front, first_tensor(inputs))[after_layer].inputs)

        def loss(hidden: Tensor) -> Tensor:
            if hasattr(head, "loss"):
                found: Tensor = head.loss(hidden, labels, self.task.loss_fn)
                return found
            return self.task.loss_fn(head(hidden), labels)

        found = profile_head(head, loss, hidden, _stopwatch(self.num_rounds), None, type(head).__name__)
        return found.seconds / self.unit_seconds


def without_learning(head: HeadConfig) -> HeadConfig:
    """The part of a head's section that its time depends on."""
    return HeadConfig(**head.resolve(pretrained=False).model_dump(exclude=LEARNING_KEYS))


def _stopwatch(num_rounds: int) -> Stopwatch:
    """Of the CPU, which is idle whenever a call returns."""
    return Stopwatch(lambda: None, num_rounds)
