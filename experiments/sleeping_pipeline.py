"""A real pipeline whose stages sleep as long as a model's would compute.

Every stage is a process with our engine, and all work at once, however few cores there are: sleeping needs
none. The time of a batch is then that of the schedule, the engine and the model's proportions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ds_interlock import InterlockConfig
from ds_interlock.planning.forecast import play
from experiments.stage_profile import PASSES, StagedModel
from measuring.engines import Workload, make_engine, seconds_of_a_batch
from measuring.ranks import run_ranks
from measuring.sleeping import sleeping_workload


@dataclass(frozen=True)
class Pipeline:
    """A model in a mode; its costs are in units, those of auxiliary heads by their ``after_layer``."""

    interlock: InterlockConfig
    model: StagedModel
    heads: dict[int, float]

    def seconds(self, micro_batches: Sequence[int], unit_seconds: float) -> dict[int, float]:
        """Measured seconds of a batch by its number of micro-batches; units sleep ``unit_seconds``."""
        # 16 micro-batches, as far as 3 to 8 batches make them.
        num_batches = {num: min(max(16 // num, 3), 8) for num in micro_batches}
        num_stages = len(self.model.stage_bounds) - 1
        arguments = {"pipeline": self, "unit_seconds": unit_seconds, "num_batches": num_batches}
        seconds: dict[int, float] = run_ranks(measure, num_stages, **arguments)[0]
        return seconds

    def predicted(self, num_micro_batches: int) -> float:
        """A batch according to the simulator, in units; the engine itself needs no time there."""
        costs, bounds = self.model.costs(self.heads), self.model.stage_bounds
        return play(self.interlock, costs, bounds, num_micro_batches, num_batches=10)[1].batch_seconds

    def workload(self, unit_seconds: float) -> Workload:
        """The layers, heads and final loss, each of which sleeps."""
        return sleeping_workload(
            [[unit_seconds * getattr(layer, name) for name in PASSES] for layer in self.model.layers],
            lambda position: unit_seconds * self.heads[position.after_layer],
            unit_seconds * self.model.loss,
            self.model.stage_bounds,
        )


def measure(pipeline: Pipeline, unit_seconds: float, num_batches: dict[int, int]) -> dict[int, float]:
    """On every rank of a job: seconds of a batch, by its number of micro-batches."""
    work = pipeline.workload(unit_seconds)
    # A head sleeps whatever its section is; fitting it first, and measuring during training, only takes time.
    section = pipeline.interlock.model_dump(exclude={"head", "trace", "myopia"}, exclude_defaults=True)
    engine = make_engine(work, section)
    return {m: seconds_of_a_batch(engine, work, m, num) for m, num in num_batches.items()}
