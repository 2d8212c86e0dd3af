"""The errors a user can meet. Each says what was wrong, what was expected, and what to do.

``ConfigError``, ``PlanError`` and ``ScheduleError`` are ValueErrors: the input was wrong.
``PeerError`` is a RuntimeError: the input was right, but another process of the job ended or
disagreed. ``assert`` is for what cannot happen.
"""

from collections.abc import Sequence


class ConfigError(ValueError):
    """The configuration, or what it was applied to, is unusable. Names the JSON key."""


class PlanError(ValueError):
    """A gradient-flow plan is impossible. Lists every fault found, not only the first."""


class ScheduleError(ValueError):
    """A program does not do what its plan says. Shows the grid with the faulty action marked."""


class DataError(ValueError):
    """Training data is missing, too small, or ran out in the middle of a batch."""


class NonfiniteError(FloatingPointError):
    """A loss or a gradient of a stage is nan or infinite, under ``interlock.nonfinite`` "error"."""


class PeerError(RuntimeError):
    """A neighbouring stage died, disagreed, or did not answer within ``timeout_seconds``."""


def list_faults(subject: str, faults: Sequence[str]) -> str:
    """One message for all faults of ``subject``: a line for one fault, a list for several."""
    if len(faults) == 1:
        return f"{subject}: {faults[0]}"
    return "\n".join([f"{subject}: {len(faults)} faults", *(f"  - {fault}" for fault in faults)])


def first_names(names: Sequence[str], most: int = 5) -> str:
    """``names`` as a list for a message, which names the first ones and counts the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
