"""The parts of the ``"interlock"`` section about observing a run: what is recorded, what is measured."""

from pydantic import Field, field_validator

from ds_interlock.config.faults import shown_as_json
from ds_interlock.config.strict import Section


class TraceConfig(Section):
    """Which training batches to record, and where to: what every stage did, and when."""

    path: str = Field(min_length=1)
    """Where to write, without an ending: `path.json` is a trace for https://ui.perfetto.dev, `path.svg` a
    picture, both with the measured batches above the same batches as simulated."""
    batches: list[int] = Field([10, 12])
    """The first and the last training batch to record, counted from 1 in this run."""

    @field_validator("batches", mode="after")
    @classmethod
    def _first_and_last(cls, batches: list[int]) -> list[int]:
        if len(batches) != 2 or not 1 <= batches[0] <= batches[1]:
            raise ValueError(f"got {shown_as_json(batches)}, expected [first, last] with 1 <= first <= last")
        return batches


class MyopiaConfig(Section):
    """How often to measure what the plan hides from a stage: the cosine of its gradient with the global one.

    Training is the same with it and without, bit for bit.
    """

    every: int = Field(ge=1)
    """Measure before every n-th training batch, the first one included, on its first micro-batch, which goes
    through the plan and through ordinary backpropagation once more. Reported as
    `Train/stage_K/gradient_cosine`. A phase that is `global` measures nothing."""
