"""The errors a user can meet. Each says what was wrong, what was expected, and what to do.

``ConfigError``, ``PlanError`` and ``ScheduleError`` are ValueErrors: the input was wrong.
``PeerError`` is a RuntimeError: the input was fine, but another process of the job went away or
disagreed. ``assert`` is kept for what cannot happen.
"""

from collections.abc import Sequence


class ConfigError(ValueError):
    """The configuration, or what it was applied to, is unusable. Names the JSON key."""


class PlanError(ValueError):
    """A gradient-flow plan is impossible. Lists every fault found, not only the first."""


class ScheduleError(ValueError):
    """A program does not do the work of its plan. Shows the grid with the faulty action marked."""


class DataError(ValueError):
    """Training data is missing, too small, or ran out in the middle of a batch."""


class PeerError(RuntimeError):
    """A neighbouring stage died, disagreed, or did not answer within ``timeout_seconds``."""


def list_faults(subject: str, faults: Sequence[str]) -> str:
    """One message for all faults of ``subject``: a line if there is one, a list if there are more."""
    if len(faults) == 1:
        return f"{subject}: {faults[0]}"
    return "\n".join([f"{subject}: {len(faults)} faults", *(f"  - {fault}" for fault in faults)])
