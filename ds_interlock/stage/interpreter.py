"""Runs the program of a stage: which messages an action takes, and where its product goes.

messenger.take ──► feed, feed_gradient ──┐             ┌──► hidden state ──► messenger.send
load ────────────► feed ─────────────────┴─ StageWork ─┴──► gradients ─────► messenger.send

On a pipeline the messenger is the links to other processes, and in one process a dictionary.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ds_interlock.schedule.action import RECV_KINDS, Action, Kind
from ds_interlock.schedule.codes import codes_of
from ds_interlock.schedule.dependency import send_of
from ds_interlock.schedule.lower import Program
from ds_interlock.stage.hidden import Gradients, Hidden, copied
from ds_interlock.stage.work import StageWork


class Messenger(Protocol):
    """Moves messages between stages. ``batch`` is the number of the program.

    ``post`` announces that the message of ``receive`` comes next from its sender. ``take`` returns the
    structures that were sent, each a tensor, a tuple of tensors, or None.
    """

    def post(self, receive: Action, batch: int) -> None: ...
    def take(self, receive: Action) -> Sequence[Any]: ...
    def send(self, send: Action, batch: int, *structures: Any) -> None: ...


class Step(NamedTuple):
    """An action, and the receives whose messages it is the first to need."""

    action: Action
    takes: tuple[Action, ...]


def steps(program: Program, stage: int) -> tuple[Step, ...]:
    """What ``stage`` does, step by step."""
    taken: set[Action] = set()
    codes = codes_of(program.plan)

    def step(action: Action) -> Step:
        takes = tuple(receive for receive in codes.received(action) if receive not in taken)
        taken.update(takes)
        return Step(action, takes)

    return tuple(map(step, program.stages[stage]))


def receive_ahead(program: Program, stage: int) -> int:
    """The most receives of a link that ``stage`` posts, from the oldest one on that it has not taken."""
    most = 0
    untaken: dict[Kind, dict[Action, int]] = defaultdict(dict)
    num_posted: dict[Kind, int] = defaultdict(int)
    for action, takes in steps(program, stage):
        if action.kind in RECV_KINDS:
            num_posted[action.kind] += 1
            untaken[action.kind][action] = num_posted[action.kind]
            most = max(most, 1 + num_posted[action.kind] - next(iter(untaken[action.kind].values())))
        for receive in takes:
            del untaken[receive.kind][receive]
    return most


@dataclass(eq=False)
class Interpreter:
    """Runs programs of one stage, action by action."""

    work: StageWork
    messenger: Messenger
    load: Callable[[int], tuple[Hidden, Any]]
    """``(inputs, labels)`` of a micro-batch in memory of their own, on the first stage."""
    begin_micro_batch: Callable[[], None] = lambda: None
    """Called when a micro-batch reaches this stage."""
    span: Callable[[Action], AbstractContextManager[None]] = lambda action: nullcontext()
    """A context for the time of each action; of a receive, for the wait until its message is there."""
    outputs: list[Hidden] | None = None
    """If not None, what leaves the last layer of the stage is added here."""

    def __post_init__(self) -> None:
        self._batch = 0
        self._gradients: dict[Action, Gradients] = {}

    def begin_batch(self, batch: int, num_micro_batches: int) -> None:
        """To be called before a program. Its messages carry the number ``batch``."""
        self._batch = batch
        self._gradients.clear()
        self.work.begin_batch(num_micro_batches)

    def run(self, action: Action, takes: Sequence[Action]) -> None:
        """Does one step, but not the end of a batch, ``REDUCE`` and ``STEP``."""
        match action.kind:
            case Kind.LOAD:
                with self.span(action):
                    self._feed(action.micro_batch, *self.load(action.micro_batch))
            case Kind.RECV_FORWARD | Kind.RECV_GRADIENT:
                self.messenger.post(action, self._batch)
            case Kind.SEND_FORWARD:
                self._send(action, *self.work.output(action.micro_batch))
            case Kind.SEND_GRADIENT:
                self._send(action, self._gradients.pop(action))
            case Kind.REDUCE | Kind.STEP:
                pass
            case _:
                for receive in takes:
                    self._take(receive)
                self._compute(action)

    def _compute(self, action: Action) -> None:
        work = self.work
        with self.span(action):
            gradients = work.run(action)
        if gradients is not None:
            send = send_of(work.plan, action)
            assert send is not None, "gradients are made to be sent"
            self._gradients[send] = gradients
        if self.outputs is not None and action.kind is Kind.FORWARD and not action.losses:
            self.outputs.append(copied(work.output(action.micro_batch)[0]))

    def _send(self, send: Action, *structures: Any) -> None:
        with self.span(send):
            self.messenger.send(send, self._batch, *structures)

    def _take(self, receive: Action) -> None:
        with self.span(receive):
            structures = self.messenger.take(receive)
        if receive.kind is Kind.RECV_FORWARD:
            self._feed(receive.micro_batch, *structures)
        else:
            self.work.feed_gradient(receive.micro_batch, receive.losses, structures[0])

    def _feed(self, micro_batch: int, inputs: Hidden, labels: Any) -> None:
        self.begin_micro_batch()
        self.work.feed(micro_batch, inputs, labels)
