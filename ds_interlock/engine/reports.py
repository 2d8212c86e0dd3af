"""Reports that travel on their own: losses, gradient norms and learning rates, late but never mixed up.

Under local and interlock no collective over the pipe could bring the final loss to stage 0. Instead every
stage posts what it has measured to the job's key-value store, in a thread of its own, and reads there how far
the last stage has got:

    last stage ── post(batch 5, final loss) ──────►  "final" = (5, 2.314)  ──► newest everywhere
    stage k    ── post(batch 7, loss, norm, lr) ──►  "values/k/0": batches 5 to 7, a parcel
    rank 0     ◄─ collected() ──────────────────────  "values/0/0", "values/1/0", ... ──► the monitor

The monitor gets what is of a step when every stage has reported it, so that steps never go down: Weights &
Biases drops what is of an earlier step than the last.

No stage waits for this: ``newest`` and ``collected`` are what has arrived. Only if a thread has stalled for
a thousand batches does its stage wait, so that nothing is lost and memory has a bound.
"""

import atexit
import itertools
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.errors import PeerError
from ds_interlock.schedule.plan import loss_name
from ds_interlock.transport.ranks import StageRanks

COSINE = "gradient_cosine"
"""What the result of ``interlock.myopia`` is called in reports."""

CLOSE_SECONDS = 5.0
"""How long to wait for a thread at the end."""
_EXCHANGE_SECONDS = 0.25
"""Values travel in parcels, so that short batches do not pay for them one by one."""
_PAUSE_SECONDS = 0.02
"""A report is posted when its stage turns to the next batch, and this thread would be in the way."""
_MOST_WAITING = 1000
"""Reports that a stage holds; then it waits until the thread, which must have stalled, takes some."""

_purposes = itertools.count()

Values = Mapping[str, float | Tensor | None]


class Reporter:
    """Posts this stage's reports, and reads how far the others have got. Rank 0 collects all reports."""

    def __init__(self, ranks: StageRanks) -> None:
        self._ranks = ranks
        self._unsent: list[dict[str, float]] = []
        self._num_sent = 0
        self._num_collected = [0] * ranks.num_stages
        self._next_exchange = 0.0
        self._store = job_store()
        self.newest: tuple[int, float] = -1, math.nan
        """Batch and value of the newest final loss that has reached this stage."""
        self._collected: queue.SimpleQueue[tuple[int, dict[str, float]]] = queue.SimpleQueue()
        self._reports: queue.Queue[tuple[int, Values] | None] = queue.Queue(_MOST_WAITING)
        self._closed = False
        self._flushing = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="interlock reports", daemon=True)
        self._thread.start()

    def post(self, batch: int, values: Values) -> None:
        """Sends off what this stage measured for a batch, counted since the engine was made."""
        self._reports.put((batch, values))

    def collected(self) -> list[tuple[int, dict[str, float]]]:
        """Takes the stages and values that have arrived since the last call, in order within a stage."""
        return [self._collected.get() for _ in range(self._collected.qsize())]

    def flush(self) -> None:
        """Waits until this stage's reports are posted and those of the others, as far as posted, read."""
        self._flushing.set()
        self._reports.put(None)
        self._reports.join()
        self._flushing.clear()
        if self._failure is not None:
            raise PeerError(
                "the job's store is gone: rank 0 or the launcher, which holds it, has most likely stopped"
            ) from self._failure

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        self._flushing.set()
        with suppress(queue.Full):
            self._reports.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)  # a thread in a collective when the process ends would abort it

    def _work(self) -> None:
        while not self._closed:
            reports = [self._reports.get()]
            self._flushing.wait(_PAUSE_SECONDS)
            # And all that have come meanwhile: batches may be shorter than the pause.
            reports += [self._reports.get() for _ in range(self._reports.qsize())]
            try:
                if self._failure is None:
                    self._exchange(reports)
            except Exception as error:  # noqa: BLE001 - kept for flush(): it must not end the training
                self._failure = error
            finally:
                for _ in reports:
                    self._reports.task_done()

    def _exchange(self, reports: Sequence[tuple[int, Values] | None]) -> None:
        for batch, measured in filter(None, reports if self._ranks.speaks_for_stage else ()):
            values = {name: float(value) for name, value in measured.items() if value is not None}
            self._unsent.append(values)
            if "final_loss" in values:
                self._store.set("final", json.dumps([batch, values["final_loss"]]))
        if self.newest[0] >= 0 or self._store.check(["final"]):
            batch, loss = json.loads(self._store.get("final"))
            self.newest = batch, loss
        if None in reports or time.monotonic() > self._next_exchange:
            self._next_exchange = time.monotonic() + _EXCHANGE_SECONDS
            if self._unsent:
                self._store.set(f"values/{self._ranks.stage}/{self._num_sent}", json.dumps(self._unsent))
                self._num_sent += 1
                self._unsent = []
            if self._ranks.global_rank == 0:
                self._collect()

    def _collect(self) -> None:
        for stage in range(self._ranks.num_stages):
            while self._store.check([key := f"values/{stage}/{self._num_collected[stage]}"]):
                for values in json.loads(self._store.get(key)):
                    self._collected.put((stage, values))
                self._store.delete_key(key)
                self._num_collected[stage] += 1


Event = tuple[str, Any, int]
"""A name, a value, and the samples trained on so far, which are DeepSpeed's steps."""


class OrderedMonitor:
    """DeepSpeed's monitor, which gets its events in the order of their steps, whenever they come.

    Those of the script and of DeepSpeed itself come this way, too.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._waiting: dict[int, list[Event]] = {}
        self._complete = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._monitor, name)

    def write_events(self, events: Sequence[Event]) -> None:
        """Takes events; those of a step that is complete are written at once."""
        for event in events:
            self._waiting.setdefault(event[2], []).append(event)
        self.write_up_to(self._complete)

    def write_up_to(self, step: float) -> None:
        """Writes what is of this step and those before it, of which no stage will report more."""
        self._complete = step
        steps = sorted(waiting for waiting in self._waiting if waiting <= step)
        if steps:
            self._monitor.write_events([event for each in steps for event in self._waiting.pop(each)])


class Progress:
    """Reports this stage's batches, and shows what all stages have reported."""

    def __init__(self, engine: DeepSpeedSide, ranks: StageRanks) -> None:
        self.reporter = Reporter(ranks)
        self.final_loss: Tensor | None = None
        """Of the newest batch, on the last stage; None elsewhere."""
        self._engine = engine
        self._ranks = ranks
        self.losses: dict[int, Tensor] = {}
        """Of the newest batch on this stage: the mean of each loss by its index in the plan."""
        self._stage_values: dict[int, dict[str, float]] = {}
        self._samples = [0] * ranks.num_stages  # of each stage's newest report
        self._monitor = OrderedMonitor(engine.monitor)
        if ranks.global_rank == 0:  # the others' write nothing
            engine.monitor = self._monitor
        atexit.register(self._monitor.write_up_to, math.inf)
        self.cosines: dict[int, float] = {}
        """Every stage's newest gradient cosine that has arrived here."""

    def set_losses(self, losses: dict[int, Tensor]) -> None:
        """Takes the mean losses of this stage in the batch, by their index in the plan."""
        self.losses = self._ranks.average_over_replicas(losses)
        self.final_loss = self.losses.get(self._engine.module.plan.final)

    def post(self, batch: int, values: Values) -> None:
        """Reports the losses of the batch, and ``values``."""
        plan = self._engine.module.plan
        names = {loss_name(plan, loss): value for loss, value in self.losses.items()}
        self.reporter.post(batch, {**names, **values})

    def stage_losses(self) -> dict[str, float]:
        """Every head's newest loss that has arrived here, by stage and name."""
        return {
            f"stage_{stage}/{name}": value
            for stage, values in sorted(self._stage_values.items())
            for name, value in values.items()
            if "loss" in name
        }

    def write(self) -> None:
        """Writes the reports that have arrived to DeepSpeed's monitor."""
        monitor = self._engine.monitor
        for stage, values in self.reporter.collected():
            samples = self._samples[stage] = int(values.pop("samples"))
            self._stage_values[stage] = values
            if COSINE in values:
                self.cosines[stage] = values[COSINE]
            if not monitor.enabled:
                continue
            names = {f"Train/stage_{stage}/{name}": value for name, value in values.items()}
            if "final_loss" in values:
                names["Train/Samples/train_loss"] = values["final_loss"]
            monitor.write_events([(name, value, samples) for name, value in names.items()])
        self._monitor.write_up_to(min(self._samples))

    def close(self) -> None:
        """Ends the thread, and writes what is left."""
        self.reporter.close()
        self._monitor.write_up_to(math.inf)
        atexit.unregister(self._monitor.write_up_to)

    def print_loss(self, batches_ago: int, loss: Tensor) -> None:
        """Prints the final loss of an earlier batch every ``steps_per_print`` batches."""
        step, every = self._engine.global_steps, self._engine.steps_per_print()
        if self._ranks.global_rank == 0 and every and step % every == 0:
            print(f"steps: {step} loss: {loss.item():0.4f} (of step {step - batches_ago})", flush=True)


def job_store(*, waits: bool = False) -> Any:
    """A part of the job's key-value store for one purpose. All ranks must call it in the same order.

    Its connection is made when it is first used, by whoever does: about one in ten takes five seconds, and a
    thread has the time. Those who never wait for a key share one.
    """
    return _LaterStore(f"ds_interlock/{next(_purposes)}", _cloned if waits else _shared)


class _LaterStore:
    """A ``PrefixStore`` that is there when it is needed."""

    _connecting = threading.Lock()

    def __init__(self, prefix: str, connect: Callable[[Any], Any]) -> None:
        self._prefix, self._connect = prefix, connect
        self._store: Any = None

    def __getattr__(self, name: str) -> Any:
        with self._connecting:
            if self._store is None:
                own = self._connect(dist.distributed_c10d._get_default_store())
                self._store = dist.distributed_c10d.PrefixStore(self._prefix, own)
        return getattr(self._store, name)


def _cloned(store: Any) -> Any:
    """The same with a connection of its own, that no collective's set-up can keep busy."""
    return store.clone() if hasattr(store, "clone") else store


_shared = lru_cache(maxsize=1)(_cloned)
