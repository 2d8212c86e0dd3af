"""``"interlock": {"schedule": [...]}``: one entry for each phase of the training."""

from pydantic import Field, ValidationInfo, field_validator

from ds_interlock.config.strict import DEFAULT_WINDOW, Mode, Section, window_of
from ds_interlock.schedule.plan import Combine


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
    """As the section's, whose value it is if not given."""

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
