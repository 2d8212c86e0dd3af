"""What all parts of the ``"interlock"`` section have in common."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ds_interlock.config.faults import shown_as_json

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
