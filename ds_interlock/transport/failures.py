"""Which rank failed first, and how long ranks wait for each other.

A rank that fails says why in a log in the job's store before it raises. One that only notices, because a
neighbour is gone or silent, looks there for the cause:

    stage 2  ValueError in a layer ───────► log: "stage 2 (rank 2) failed in batch 7: ValueError: ..."
    stage 1  connection closed     ◄─────── log
    stage 0  connection closed     ◄─────── log

So each rank ends with one sentence, and the same cause. What a rank does is in one of a few *sections*,
each of which has a time limit for DeepSpeed's collectives; messages between stages have their own.
"""

import json
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist

from ds_interlock.errors import PeerError

_WATCH_SECONDS = 0.5
"""How often a rank reads what others have said: the log ends with the process that holds the store."""
_GRACE_SECONDS = 2.0
"""How long a rank whose time is up waits for others to say why they were silent: theirs may end later."""
_MOST_CHARACTERS = 400

_USUAL = dist.distributed_c10d.default_pg_timeout

_PEER = re.compile(r"stage \d+ \(rank (\d+)\)")
_SILENT = ("sent nothing for", "took nothing for", "Timed out", "timed out")

# What to say of a rank that is gone or silent: not how this one noticed.
_DIED = (
    "stage {stage} (rank {rank}) has most likely stopped or died, its connection is closed: see its own "
    "error, or how the launcher says that it ended"
)
_IN_COLLECTIVE = (
    "a rank has ended in a collective operation with this one",
    "ranks did not join this one in a collective operation in time",
)


@dataclass(frozen=True)
class Stop:
    """Why a rank stopped, as it says in the log."""

    rank: int
    stage: int
    batch: int
    text: str
    is_cause: bool
    """Whether it failed by itself, rather than noticed that another rank had."""
    suspect: int | None = None
    """The rank that it waited for."""
    waited: bool = False
    """Whether its time was up, so that those before it in the chain may still tell of theirs."""

    def __str__(self) -> str:
        return f"stage {self.stage} (rank {self.rank})"

    @property
    def when(self) -> str:
        """The batch, for a sentence."""
        return f"in batch {self.batch}" if self.batch else "at the start"


class FailureLog:
    """The log of a job's failures in ``store``, and a thread that reads it. All ranks must make it."""

    def __init__(self, store: Any, stage_of: Callable[[int], int]) -> None:
        self._store = store
        self._stage_of = stage_of
        self._rank = dist.get_rank()
        self._stops: list[Stop] = []
        self._has_posted = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.close = weakref.finalize(self, self._closed.set)
        """Ends the thread, which ends with this object and with the process in any case."""
        watch = partial(_watch, weakref.ref(self), self._closed)
        threading.Thread(target=watch, name="interlock failures", daemon=True).start()

    def retract(self) -> None:
        """The job went on here: what this rank has said was no reason to stop."""
        if self._has_posted:
            self._post(Stop(self._rank, self._stage_of(self._rank), 0, "", is_cause=False))
            self._has_posted = False

    def explain(self, error: Exception, batch: int) -> Exception:
        """Tells the others of ``error``; returns what this rank should raise."""
        text = " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_CHARACTERS]
        own = Stop(self._rank, self._stage_of(self._rank), batch, text, is_cause=True)
        own = self._of_peer(own, error)
        self._post(own)
        if own.is_cause:
            error.add_note(f"on {own}, {own.when}")
            if self._holds_store:
                time.sleep(2 * _WATCH_SECONDS)  # the others read the log before it is gone
            return error
        root = self._root_of(own)
        if root is not own:
            why = f"{root} failed" if root.is_cause else f"{root} stopped"
            return PeerError(f"{own} stopped {own.when}: {why} {root.when}: {root.text}")
        return PeerError(f"{own} stopped {own.when}: {own.text}{self._absent(own.suspect)}")

    def _of_peer(self, own: Stop, error: Exception) -> Stop:
        """``own`` as what it is if ``error`` only says that another rank is gone or silent."""
        is_of_link = isinstance(error, PeerError)
        is_of_collective = type(error) is RuntimeError and "gloo" in own.text
        if not is_of_link and not is_of_collective and not isinstance(error, dist.DistError):
            return own
        peer = _PEER.search(own.text) if is_of_link else None
        suspect = int(peer[1]) if peer else None
        silent = any(sign in own.text for sign in _SILENT)
        closed = not silent and (not is_of_link or "has most likely stopped" in own.text)
        if not silent and not closed:
            return own  # it disagrees
        text = str(error) if is_of_link else _IN_COLLECTIVE[silent]
        if closed and suspect is not None:
            text = _DIED.format(stage=self._stage_of(suspect), rank=suspect)
        return replace(own, text=text, is_cause=False, suspect=suspect, waited=silent)

    @property
    def _holds_store(self) -> bool:
        return self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def _others(self) -> dict[int, Stop]:
        """What other ranks have said last, by rank."""
        newest = {stop.rank: stop for stop in self._stops if stop.rank != self._rank}
        return {rank: stop for rank, stop in newest.items() if stop.text}

    def _root_of(self, own: Stop) -> Stop:
        """The stop behind ``own``, as far as ranks have said; ``own`` if nothing is known."""
        grace = _GRACE_SECONDS if own.waited else _WATCH_SECONDS if own.suspect is None else 0.0
        deadline = time.monotonic() + grace
        while True:
            self.read()
            others = self._others()
            for stop in others.values():
                if stop.is_cause:
                    return stop
            root = own
            if own.suspect is None:
                root = next((stop for stop in others.values() if stop.suspect is not None), own)
            seen = {own.rank}
            while root.suspect in others and root.suspect not in seen:
                seen.add(root.suspect)
                root = others[root.suspect]
            if time.monotonic() >= deadline or (root is not own and not root.waited):
                return root
            time.sleep(_WATCH_SECONDS / 5)

    def _absent(self, suspect: int | None) -> str:
        """Names the ranks that have said nothing, if this one does not know for which it waited."""
        heard = {self._rank, *self._others()}
        absent = [rank for rank in range(dist.get_world_size()) if rank not in heard]
        names = ", ".join(f"stage {self._stage_of(rank)} (rank {rank})" for rank in absent)
        return f"; no word from {names}" if names and suspect is None else ""

    def _post(self, stop: Stop) -> None:
        self._has_posted = True
        try:
            number = self._store.add("stops", 1)
            self._store.set(f"stop/{number}", json.dumps(asdict(stop)))
        except (dist.DistError, RuntimeError):
            self._closed.set()  # the process that holds the store is gone

    def read(self) -> None:
        """Reads what is new in the log."""
        with self._lock:
            try:
                while self._store.check([key := f"stop/{len(self._stops) + 1}"]):
                    self._stops.append(Stop(**json.loads(self._store.get(key))))
            except (dist.DistError, RuntimeError):
                self._closed.set()


def _watch(log: "weakref.ref[FailureLog]", closed: threading.Event) -> None:
    while not closed.wait(_WATCH_SECONDS) and (owner := log()) is not None:
        owner.read()
        del owner


Owner = TypeVar("Owner", bound="HasSections")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class HasSections(Protocol):
    """Has methods that are a ``section``."""

    sections: "Sections"


class Sections:
    """Limits and explains what a rank does with others.

    Args:
        log: Where failures are told.
        seconds: The limit of each section.
        batch: The number of the batch under way.
    """

    def __init__(self, log: FailureLog, seconds: dict[str, float], batch: Callable[[], int]) -> None:
        self.log = log
        self.has_failed = False
        """Whether the last section has raised."""
        self._seconds = seconds
        self._batch = batch
        self._limits = CollectiveLimits()

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """The section ``name``; may be within another one."""
        self.has_failed = False
        try:
            with self._limits.at(self._seconds[name]):
                yield
        except Exception as error:
            if self.has_failed:
                raise  # explained by the section within
            self.has_failed = True
            explained = self.log.explain(error, self._batch())
            if explained is error:
                raise
            raise explained from None
        except BaseException:
            self.has_failed = True
            raise
        self.log.retract()

    def tell(self, error: BaseException | None) -> bool:
        """Tells the others of an error outside of all sections, if it is one."""
        if isinstance(error, Exception):
            self.log.explain(error, self._batch())
        return error is not None


def section(
    name: str,
) -> Callable[
    [Callable[Concatenate[Owner, Arguments], Result]], Callable[Concatenate[Owner, Arguments], Result]
]:
    """Makes a method the section ``name`` of its object's ``sections``."""

    def decorate(
        method: Callable[Concatenate[Owner, Arguments], Result],
    ) -> Callable[Concatenate[Owner, Arguments], Result]:
        @wraps(method)
        def inside(owner: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with owner.sections.enter(name):
                return method(owner, *args, **kwargs)

        return inside

    return decorate


class CollectiveLimits:
    """Time limits of the gloo process groups that exist now: torch's own are half an hour.

    Those of NCCL are left alone: its watchdog would end the process without a word.
    """

    def __init__(self) -> None:
        groups = list(dist.distributed_c10d._world.pg_map)
        cpu = torch.device("cpu")
        backends = [group._get_backend(cpu) for group in groups if cpu in group._device_types]
        self._usual = {b: b.options._timeout for b in backends if isinstance(b, dist.ProcessGroupGloo)}
        self._limit: timedelta | None = None

    @contextmanager
    def at(self, seconds: float) -> Iterator[None]:
        """Within it an operation that is not done after ``seconds`` fails."""
        previous = self._limit
        self._apply(timedelta(seconds=seconds))
        try:
            yield
        finally:
            self._apply(previous)

    def _apply(self, limit: timedelta | None) -> None:
        self._limit = limit
        # Of the groups that are made from now on.
        dist.distributed_c10d.default_pg_timeout = _USUAL if limit is None else limit
        for backend, usual in self._usual.items():
            backend._set_default_timeout(usual if limit is None else limit)
