"""Copies of the unembedding on their way upstream, on a channel of their own, while training goes on.

    stage       0             1             2             3
    before batch                                          t copies its unembedding, and sends it
                                            t + R/3  ◄──
                              t + 2R/3 ◄──                takes it and sends it on
                t + R    ◄──
    before batch t + R every stage puts it into use

Which batch a stage takes a copy before depends on its distance from the last stage alone. It has R batches
for the whole way: no stage waits as long as each is ahead of the next one by less than its share of them.
Whoever flushes the links settles what is under way first; then all stages have the same copies.
"""

from collections.abc import Callable, Sequence

from ds_interlock.schedule.action import Action, Kind
from ds_interlock.stage.shared_readout import SharedReadout, SharedUnembedding, Source, Weights, snapshot
from ds_interlock.transport.agreement import gather, raised_by_all
from ds_interlock.transport.links import Links
from ds_interlock.transport.ranks import StageRanks


class Copies:
    """What this stage does for the heads that read with copies, its own and those of other stages."""

    def __init__(
        self,
        source: Source,
        refresh_every: int,
        stages: range,
        ranks: StageRanks,
        copies: Sequence[SharedUnembedding],
        live: Callable[[Source], Weights],
    ) -> None:
        self.refresh_every = refresh_every
        self.stages = stages
        """From the first one with a head to that of the unembedding."""
        self.shared = SharedReadout(copies) if copies else None
        """Those of this stage's heads."""
        self.links: Links | None = None
        """To be set before the first batch."""
        self._stage = ranks.stage
        self._live = (lambda: live(source)) if ranks.stage == stages[-1] else None
        self._takes_after = refresh_every * (stages[-1] - ranks.stage) // max(len(stages) - 1, 1)
        self._due: int | None = None
        """The batch of the copy that a receive is posted for."""

    def before_batch(self, batch: int) -> None:
        """To be called with the number of every training batch of the run."""
        since = batch % self.refresh_every
        if since == 0:
            self.settle()
            self._turn()
            self._start(batch)
        if since == self._takes_after or batch == 0:
            self.settle()
        if batch == 0:
            self._turn()

    def settle(self) -> None:
        """Waits for the copy that is under way, if any, and sends it on. It is not in use before its time."""
        if self._due is not None:
            assert self.links is not None
            (weights,) = self.links.take(Action(self._stage, Kind.RECV_COPY, 0))
            self._pass_on(weights, self._due)
            self._due = None

    def refresh(self) -> None:
        """Lets heads read with the live weights from now on. All stages must call it."""
        self.settle()
        self._start(-1)
        self.settle()
        self._turn()

    def state(self) -> dict[str, Weights] | None:
        """For checkpoints, once nothing is under way; None if no head is here."""
        return None if self.shared is None else {"in_use": self.shared.in_use, "next": self.shared.next}

    def restore(self, state: dict[str, Weights] | None) -> None:
        """Takes up a ``state``; without one the copies that the heads have come into use again."""
        self.settle()
        if self.shared is not None:
            in_use = self.shared.in_use
            state = state or {"in_use": in_use, "next": in_use}
            self.shared.restore(state["in_use"], state["next"])

    def _start(self, batch: int) -> None:
        if self._live is not None:
            self._pass_on(snapshot(self._live()), batch)
        elif self._stage in self.stages:
            assert self.links is not None
            self.links.post(Action(self._stage, Kind.RECV_COPY, 0), batch)
            self._due = batch

    def _pass_on(self, weights: Weights, batch: int) -> None:
        if self.shared is not None:
            self.shared.take(weights)
        if self._stage > self.stages[0]:
            assert self.links is not None
            self.links.send_copy(Action(self._stage, Kind.SEND_COPY, 0), batch, weights)

    def _turn(self) -> None:
        if self.shared is not None:
            self.shared.turn()


def agree_on_copies(
    ranks: StageRanks,
    copies: Sequence[SharedUnembedding],
    live: Callable[[Source], Weights],
    stage_of: Callable[[int], int],
    first_stage: int,
) -> Copies | None:
    """What this stage does for shared readouts; None if no stage has any. All ranks must call it.

    Nor if the unembedding is frozen: then the copies that heads are built with are those of a lens.

    Args:
        ranks: This rank among the others.
        copies: Those in this stage's heads.
        live: The weights at a source, on the stage that has it.
        stage_of: The stage of a layer.
        first_stage: The first one with a head in any phase.

    Raises:
        ConfigError: On all ranks, if the stage of the unembedding does not find it.
    """
    named = [each for each in gather([(c.source, c.refresh_every) for c in copies[:1]]) if each]
    if not named:
        return None
    [(source, refresh_every)] = named[0]
    stages = range(first_stage, stage_of(source.layer) + 1)
    with raised_by_all():
        is_trained = ranks.stage == stages[-1] and live(source)[0].requires_grad
    if not any(gather(is_trained)):
        return None
    return Copies(source, refresh_every, stages, ranks, copies, live)
