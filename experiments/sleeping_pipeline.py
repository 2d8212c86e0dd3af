"""A real pipeline whose stages sleep as long as a model's would compute.

Every stage is a process with our engine, and all work at once, however few cores there are: sleeping needs
none. What a batch takes is then what the schedule, the engine and the model's proportions make of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor

from benchmarks.engines import Workload, make_engine, seconds_of_a_batch
from benchmarks.ranks import run_ranks
from benchmarks.sleeping import SleepingHead, SleepingLayer, sleep, sleeping_loss, use_exact_timers
from ds_interlock import InterlockConfig
from ds_interlock.planning.forecast import play
from experiments.staged_model import StagedModel

_WIDTH = 16
_NUM_SIMULATED_BATCHES = 10


@dataclass(frozen=True)
class Pipeline:
    """A model in a mode; its costs are in units.

    Attributes:
        interlock: The mode.
        model: What layers and final loss cost, and where it is cut.
        heads: What every auxiliary head costs, by its ``after_layer``.
    """

    interlock: InterlockConfig
    model: StagedModel
    heads: dict[int, float]

    def seconds(self, micro_batches: Sequence[int], unit_seconds: float) -> dict[int, float]:
        """Measured seconds of a batch, by its number of micro-batches; its work grows with them.

        Args:
            micro_batches: The numbers to measure with, M.
            unit_seconds: How long a unit is slept for.
        """
        num_stages = len(self.model.stage_bounds) - 1
        found: dict[int, float] = run_ranks(
            measure,
            num_stages,
            interlock=self.interlock,
            model=self.model,
            head_seconds={place: unit_seconds * units for place, units in self.heads.items()},
            unit_seconds=unit_seconds,
            num_batches={num: _num_batches(num) for num in micro_batches},
        )[0]
        return found

    def predicted(self, num_micro_batches: int) -> float:
        """What the simulator says that a batch takes, in units; the engine itself needs no time there."""
        bounds = self.model.stage_bounds
        costs = self.model.cost_model(self.interlock.plan(bounds), self.heads)
        _, simulation = play(
            self.interlock, costs, bounds, num_micro_batches, num_batches=_NUM_SIMULATED_BATCHES
        )
        return simulation.batch_seconds


def _num_batches(num_micro_batches: int) -> int:
    """Batches to time: 16 micro-batches, as far as 3 to 8 batches make them."""
    return min(max(16 // num_micro_batches, 3), 8)


# In the processes of a job.


def measure(
    interlock: InterlockConfig,
    model: StagedModel,
    head_seconds: dict[int, float],
    unit_seconds: float,
    num_batches: dict[int, int],
) -> dict[int, float]:
    """On every rank of a job: seconds of a batch, by its number of micro-batches.

    Args:
        interlock: The mode.
        model: What layers and final loss cost, in units.
        head_seconds: How long every auxiliary head sleeps, by its ``after_layer``.
        unit_seconds: How long a unit is slept for.
        num_batches: For each number of micro-batches the batches to time.
    """
    use_exact_timers()
    work = _workload(model, head_seconds, unit_seconds)
    # A head sleeps whatever its section says; fitting it first, and measuring on the way, only takes time.
    section = interlock.model_dump(exclude={"head", "trace", "myopia"}, exclude_defaults=True)
    engine = make_engine("", work, section)
    return {m: seconds_of_a_batch(engine, work, m, num) for m, num in num_batches.items()}


def _workload(model: StagedModel, head_seconds: dict[int, float], unit_seconds: float) -> Workload:
    seconds = [
        [unit_seconds * units for units in (layer.forward, layer.input_gradient, layer.weight_gradient)]
        for layer in model.layers
    ]
    return Workload(
        layers=[LayerSpec(SleepingLayer, _WIDTH, *passes) for passes in seconds],
        layer_seconds=[sum(passes) for passes in seconds],
        loss_fn=_FinalLoss(unit_seconds * model.loss),
        micro_batch=(torch.ones(1, _WIDTH), torch.zeros(1, _WIDTH)),
        head=lambda place: _Head(head_seconds[place.after_layer]),
        stage_bounds=model.stage_bounds,
    )


class _FinalLoss:
    """A loss whose forward and backward together take ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        sleep(self.seconds)
        return sleeping_loss(outputs, labels)


class _Head(SleepingHead):
    """Its loss is part of its seconds: the final loss has others."""

    def loss(self, hidden: Tensor, labels: Tensor, loss_fn: Any) -> Tensor:
        return sleeping_loss(self(hidden), labels)
