"""The errors a user can meet. Each says what was wrong, what was expected, and what to do.

``ConfigError``, ``PlanError`` and ``ScheduleError`` are ValueErrors: the input was wrong.
``PeerError`` is a RuntimeError: the input was right, but another process of the job ended or
disagreed. ``assert`` is for what cannot happen.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class MayFail(Protocol):
    """Has methods that ``remembers_failure`` watches."""

    has_failed: bool  # whether the last of them that was called has raised


Owner = TypeVar("Owner", bound=MayFail)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ConfigError(ValueError):
    """The configuration, or what it was applied to, is unusable. Names the JSON key."""


class PlanError(ValueError):
    """A gradient-flow plan is impossible. Lists every fault found, not only the first."""


class ScheduleError(ValueError):
    """A program does not do what its plan says. Shows the grid with the faulty action marked."""


class DataError(ValueError):
    """Training data is missing, too small, or ran out in the middle of a batch."""


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


def remembers_failure(
    method: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """Makes ``method`` note in the object's ``has_failed`` whether it raised, until the next one returns."""

    @wraps(method)
    def remembering(owner: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            result = method(owner, *args, **kwargs)
        except BaseException:
            owner.has_failed = True
            raise
        owner.has_failed = False
        return result

    return remembering
