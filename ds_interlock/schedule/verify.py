"""The verifier: a program does the work of its plan, or here is everything that is wrong with it.

It restates no rule: what must be done, in which order, and with which messages comes from the functions
that make programs. All faults are raised at once, with the grid and the faulty actions marked in it:

    program: 0W1 comes before 0W0, which it needs
    stage 0 | F0 F1                >0W1< >0W0< S2
    stage 1 |    F0 H0 B0 F1 H1 B1 S2
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ds_interlock.errors import ScheduleError, list_faults
from ds_interlock.schedule.action import COMPUTE_KINDS, SEND_KINDS, Action, Kind
from ds_interlock.schedule.dependency import batch_end, dependencies, evaluation_actions, stage_actions
from ds_interlock.schedule.lower import Program, micro_batch_starts, receive_of, receives_needed, send_of
from ds_interlock.schedule.render import Place, render_text
from ds_interlock.schedule.simulate import StandstillError, simulate

Ends = Sequence[tuple[Action, ...]]
"""For each stage what it ends a batch with."""


def verify(program: Program, *, extra_in_flight: int = 0) -> None:
    """Checks that ``program`` is one training batch of its plan.

    Raises:
        ScheduleError: Listing every fault, with the grid; a standstill only if there is no other fault.
    """
    ends = [batch_end(stage, program.num_micro_batches) for stage in range(program.plan.num_stages)]
    _verify(program, stage_actions, ends, extra_in_flight)


def verify_evaluation(program: Program, *, all_heads: bool) -> None:
    """Checks, as ``verify``, that ``program`` is one evaluation batch, with the final loss or all losses."""
    _verify(program, partial(evaluation_actions, all_heads=all_heads), [()] * program.plan.num_stages, 0)


def _verify(program: Program, work_of: Callable[..., tuple[Action, ...]], ends: Ends, extra: int) -> None:
    """Raises ScheduleError unless the work of each stage is ``work_of`` each micro-batch, then its end."""
    plan, num_micro_batches = program.plan, program.num_micro_batches
    faults = [
        f"{name} has {len(value)} entries for {plan.num_stages} stages"
        for name, value in (("slots", program.slots), ("stages", program.stages))
        if len(value) != plan.num_stages
    ]
    faults += [f"stage {s} has {n} slots, it needs at least 1" for s, n in enumerate(program.slots) if n < 1]
    if num_micro_batches < 1:
        faults.append(f"a batch needs at least 1 micro-batch, got {num_micro_batches}")
    if faults:
        raise ScheduleError(list_faults("program", faults))
    work = [
        [action for number in range(num_micro_batches) for action in work_of(plan, stage, number)]
        for stage in range(plan.num_stages)
    ]
    _Verifier(program, work, ends).check(extra)


class _Verifier:
    """Collects the faults of one program.

    Attributes:
        expected: All actions that must run, communication included.
        made_by: For each send the action that makes its message.
        at: Where every expected action is that is on its own stage (the first, if several).
        order: For each stage those actions in the order of its list.
    """

    def __init__(self, program: Program, work: Sequence[Sequence[Action]], ends: Ends) -> None:
        self.program = program
        self.plan = program.plan
        self.ends = ends
        self.faults: list[str] = []
        self.faulty: set[Place] = set()
        self.missing: list[Action] = []
        self.made_by: dict[Action, Action] = {}
        self.expected = self._with_communication(work)
        self.at = {
            action: (stage, position)
            for stage, actions in enumerate(program.stages)
            for position, action in reversed(list(enumerate(actions)))
            if action.stage == stage and action in self.expected
        }
        self.order = [
            sorted((a for a in self.at if a.stage == stage), key=self.at.__getitem__)
            for stage in range(len(work))
        ]

    def _with_communication(self, work: Sequence[Sequence[Action]]) -> set[Action]:
        expected = {action for actions in (*work, *self.ends) for action in actions}
        expected.update(Action(0, Kind.LOAD, number) for number in range(self.program.num_micro_batches))
        for action in (action for actions in work for action in actions):
            send = send_of(self.plan, action)
            if send is not None:
                self.made_by[send] = action
                expected |= {send, receive_of(send)}
        return expected

    def check(self, extra_in_flight: int) -> None:
        self._check_slots(extra_in_flight)
        self._check_presence()
        self._check_order()
        self._check_ends()
        self._check_links()
        self._check_buffers()
        if not self.faults:  # even if every send waits for its receiver, all stages finish two batches
            try:
                simulate(self.program, num_batches=2, send_ahead=0)
            except StandstillError as error:
                self._fault(str(error), error.places)
        if self.faults:
            grid = render_text(self.program, faulty=self.faulty, missing=self.missing)
            raise ScheduleError(f"{list_faults('program', self.faults)}\n{grid}")

    def _fault(self, text: str, places: Iterable[Place]) -> None:
        self.faults.append(text)
        self.faulty.update(places)

    def _check_slots(self, extra_in_flight: int) -> None:
        for stage, slots in enumerate(self.program.slots):
            most = self.plan.in_flight(stage) + extra_in_flight
            if slots > most:
                allow = f"the plan and extra_in_flight {extra_in_flight} allow {most}"
                self._fault(f"stage {stage} has slots for {slots} micro-batches; {allow}", [])

    def _check_presence(self) -> None:
        """Every expected action appears once, on its own stage, and no other does."""
        places: dict[Action, list[Place]] = {}
        for stage, actions in enumerate(self.program.stages):
            for position, action in enumerate(actions):
                places.setdefault(action, []).append((stage, position))
        for action, of_action in places.items():
            astray = [place for place in of_action if place[0] != action.stage]
            if action not in self.expected:
                self._fault(f"{action} is not work of the plan; leave it out", of_action)
            elif astray:
                self._fault(f"{action} is in the list of stage {astray[0][0]}, not of its own stage", astray)
            elif len(of_action) > 1:
                self._fault(f"{action} appears {len(of_action)} times, expected once", of_action)
        for action in sorted(self.expected - places.keys()):
            self._fault(f"{action} is missing", [])
            self.missing.append(action)

    def _check_order(self) -> None:
        """What an action needs is earlier in its stage's list, and so is what it sends."""
        for action, place in self.at.items():
            for needed in self._needed_before(action):
                if needed in self.at and self.at[needed] > place:
                    self._fault(f"{action} comes before {needed}, which it needs", [place, self.at[needed]])

    def _needed_before(self, action: Action) -> tuple[Action, ...]:
        """What must be earlier in the list of ``action``'s own stage. The ends are a check of their own."""
        if action.kind in SEND_KINDS:
            return (self.made_by[action],)
        if action.kind not in COMPUTE_KINDS or action.kind is Kind.STEP:
            return ()
        own = tuple(needed for needed in dependencies(self.plan, action) if needed.stage == action.stage)
        if action.kind is Kind.FORWARD and action.stage == 0:
            own = (*own, Action(0, Kind.LOAD, action.micro_batch))
        return (*own, *receives_needed(self.plan, action))

    def _check_ends(self) -> None:
        """A stage ends with its reduce and its step, after all other work of the batch."""
        for stage, end in enumerate(self.ends):
            actions = self.program.stages[stage]
            last = actions[-len(end) :] if end else ()
            if last != end and all(action in self.at for action in end):
                must, does = (" ".join(map(str, some)) for some in (end, last))
                text = f"stage {stage} must end with {must}, it ends with {does}"
                self._fault(text, [self.at[action] for action in end])

    def _check_links(self) -> None:
        """A link delivers messages in the order they are sent: both its ends agree on it."""
        for stage, actions in enumerate(self.order):
            for kind in sorted(SEND_KINDS):
                sends = {receive_of(a): a for a in actions if a.kind is kind and receive_of(a) in self.at}
                if sends:
                    other = next(iter(sends)).stage
                    taken = [sends[action] for action in self.order[other] if action in sends]
                    self._compare([*sends.values()], taken, f"stage {stage} sends", f"stage {other} receives")
        loads = [action for action in self.order[0] if action.kind is Kind.LOAD]
        self._compare(loads, sorted(loads), "stage 0 loads", "the data set has")

    def _compare(self, ours: Sequence[Action], theirs: Sequence[Action], we: str, they: str) -> None:
        wrong = [(mine, other) for mine, other in zip(ours, theirs, strict=False) if mine != other]
        if wrong:
            sent, taken = (", ".join(map(str, actions)) for actions in zip(*wrong, strict=True))
            places = [self.at[action] for action, _ in wrong]
            places += [self.at[receive_of(a)] for a, _ in wrong if a.kind in SEND_KINDS]
            self._fault(f"{we} {sent} where {they} {taken}, in this order", places)

    def _check_buffers(self) -> None:
        """No more micro-batches at once than slots, and no two of them in one buffer."""
        buffer = self.program.buffer
        for stage, slots in enumerate(self.program.slots):
            for action, live in micro_batch_starts(self.order[stage]):
                clash = [other for other in live if buffer(other) == buffer(action)]
                if len(live) >= slots:
                    text = f"begins micro-batch {len(live) + 1} at once on stage {stage}, slots: {slots}"
                    self._fault(f"{action} {text}", [self.at[action]])
                elif clash:
                    text = f"{action} takes the buffer that {clash[0]} filled and that is still in use"
                    self._fault(text, [self.at[action], self.at[clash[0]]])
