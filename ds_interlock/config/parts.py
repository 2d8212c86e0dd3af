"""What the parts of the ``"interlock"`` section have in common, and the parts: phases, traces, the meter."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ds_interlock.config.faults import shown_as_json
from ds_interlock.schedule.plan import Combine

SECTION = "interlock"
DEFAULT_WINDOW = 2

Mode = Literal["global", "local", "interlock"]


class Section(BaseModel):
    """A JSON object whose values are taken as they are: ``"2"`` is not 2, and ``1`` is not ``true``."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def window_of(mode: Mode | None, window: float | None) -> float | None:
    """The window that goes with ``mode`` (None if it is faulty itself), where ``window`` is given, or not."""
    if window is None:
        return DEFAULT_WINDOW if mode == "interlock" else None
    window = int(window) if window.is_integer() else window  # messages say 2, not 2.0
    if mode in ("global", "local"):
        raise ValueError(
            f'got {shown_as_json(window)}, but mode is "{mode}", which has no window; leave one of them out'
        )
    return window


class PhaseConfig(Section):
    """One phase of `schedule`: how gradients flow from some step on.

    All other keys of the section hold for the whole run.
    """

    from_step: int = Field(ge=0)
    """Optimizer steps after which the phase begins: 0 for the first, then rising."""
    mode: Mode | None = None
    """As the section's; `interlock` if there is a `window`, otherwise needed."""
    window: float | None = Field(
        None,
        ge=1,
        validate_default=True,
        description=f"As the section's; {DEFAULT_WINDOW} if `mode` is `interlock` and this is not given.",
    )
    combine: Combine | None = None
    """As the section's; if not given, the section's value."""

    @field_validator("window", mode="after")
    @classmethod
    def _mode_or_window(cls, window: float | None, info: ValidationInfo) -> float | None:
        mode = info.data.get("mode", "interlock")  # missing if it is faulty itself
        if mode is None and window is None:
            raise ValueError('missing, and so is mode: say one of them, as "window": 2 or "mode": "global"')
        return window_of(mode, window)

    def keys(self, combine: Combine) -> dict[str, object]:
        """The keys in which a section for this phase alone differs; its ``combine`` is the default."""
        mode = self.mode or "interlock"
        return {"schedule": None, "mode": mode, "window": self.window, "combine": self.combine or combine}


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
