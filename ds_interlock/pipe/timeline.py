"""When each stage did what: recorded on the ranks, gathered for the renderer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ds_interlock.schedule.action import Action
from ds_interlock.schedule.simulate import Span


class Recorder:
    """Notes start and end of this stage's actions while it is switched on."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize  # an accelerator works on after its calls have returned
        self.on = False
        self.batch = 0
        self._spans: list[Span] = []

    def start(self, batch: int) -> None:
        """Forgets what was recorded and records from now on."""
        self._spans = []
        self.batch = batch
        self.on = True

    @contextmanager
    def span(self, action: Action) -> Iterator[None]:
        """Records the time its body takes as the time of ``action``."""
        if not self.on:
            yield
            return
        # Wall-clock time, so that the rows of ranks on one machine can be laid over each other.
        start = time.time()
        yield
        self.synchronize()
        self._spans.append(Span(action, self.batch, start, time.time()))

    def gather(self, stage: int, num_stages: int) -> tuple[tuple[Span, ...], ...]:
        """Everybody's spans, a row a stage, in seconds since the first began. A collective call."""
        self.on = False
        gathered: list[tuple[int, list[Span]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (stage, self._spans))
        rows: list[list[Span]] = [[] for _ in range(num_stages)]
        for entry in gathered:
            assert entry is not None
            owner, spans = entry
            rows[owner] = rows[owner] or spans  # one data-parallel replica stands for all
        begin = min((span.start for row in rows for span in row), default=0.0)
        return tuple(
            tuple(Span(s.action, s.batch, s.start - begin, s.end - begin) for s in row) for row in rows
        )
