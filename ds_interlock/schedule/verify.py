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
from ds_interlock.schedule.action import SEND_KINDS, Action, Kind
from ds_interlock.schedule.codes import codes_of
from ds_interlock.schedule.dependency import batch_end, evaluation_actions, stage_actions
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.render import render_text
from ds_interlock.schedule.standstill import Place, StandstillError, standstill

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
    work = [action for stage in range(plan.num_stages) for action in work_of(plan, stage, 1)]
    _Verifier(program, work, ends).check(extra)


class _Verifier:
    """Collects the faults of one program. Actions are in codes, where they are not called actions.

    Attributes:
        expected: All that must run, communication included.
        before: By op, distances to what must be earlier in its stage's list.
        at: The position of what is expected and is on its own stage (the first, if several).
        order: For each stage the same in the order of its list.
    """

    def __init__(self, program: Program, work: Sequence[Action], ends: Ends) -> None:
        self.program = program
        self.plan = program.plan
        self.codes = codes = codes_of(program.plan)
        self.ends = ends
        self.faults: list[str] = []
        self.faulty: set[Place] = set()
        self.missing: list[Action] = []
        self.before = [
            [
                *(d for d in codes.needs[op] if codes.ops[(op + d) % codes.size].stage == action.stage),
                *codes.takes[op],
                *filter(None, [codes.load[op]]),
            ]
            for op, action in enumerate(codes.ops)
        ]
        ops = {codes.of(action) - codes.size for action in (*work, Action(0, Kind.LOAD, 1))}
        for op in tuple(ops):
            if codes.send[op]:
                send = op + codes.send[op]
                self.before[send].append(-codes.send[op])
                ops |= {send, send + codes.receive[send]}
        numbers = range(program.num_micro_batches)
        self.expected = {number * codes.size + op for number in numbers for op in ops}
        self.expected.update(codes.of(action) for end in ends for action in end)
        self.at: dict[int, int] = {}
        self.order: list[list[int]] = [[] for _ in program.stages]

    def check(self, extra_in_flight: int) -> None:
        self._check_slots(extra_in_flight)
        self._check_presence()
        self._check_order()
        self._check_ends()
        self._check_links()
        self._check_buffers()
        if not self.faults and (places := standstill(self.codes, self.order)):
            self._fault(str(StandstillError(places, self.program.stages)), places)
        if self.faults:
            grid = render_text(self.program, faulty=self.faulty, missing=self.missing)
            raise ScheduleError(f"{list_faults('program', self.faults)}\n{grid}")

    def _fault(self, text: str, places: Iterable[Place]) -> None:
        self.faults.append(text)
        self.faulty.update(places)

    def _places(self, *codes: int) -> list[Place]:
        return [(self.codes.ops[code % self.codes.size].stage, self.at[code]) for code in codes]

    def _check_slots(self, extra_in_flight: int) -> None:
        for stage, slots in enumerate(self.program.slots):
            most = self.plan.in_flight(stage) + extra_in_flight
            if slots > most:
                allow = f"the plan and extra_in_flight {extra_in_flight} allow {most}"
                self._fault(f"stage {stage} has slots for {slots} micro-batches; {allow}", [])

    def _check_presence(self) -> None:
        """Every expected action appears once, on its own stage, and no other does."""
        others: dict[Action, list[Place]] = {}
        for stage, actions in enumerate(self.program.stages):
            for position, action in enumerate(actions):
                code = self.codes.find(action)
                if code in self.expected and code not in self.at and action.stage == stage:
                    self.at[code] = position
                    self.order[stage].append(code)
                else:
                    others.setdefault(action, []).append((stage, position))
        absent = self.expected - self.at.keys()
        for action, places in others.items():
            code = self.codes.find(action)
            astray = [place for place in places if place[0] != action.stage]
            if code not in self.expected:
                self._fault(f"{action} is not work of the plan; leave it out", places)
            elif astray:
                self._fault(f"{action} is in the list of stage {astray[0][0]}, not of its own stage", astray)
                absent.discard(code)
            else:
                places += self._places(code)
                self._fault(f"{action} appears {len(places)} times, expected once", places)
        self.missing = sorted(map(self.codes.action, absent))
        self.faults += [f"{action} is missing" for action in self.missing]

    def _check_order(self) -> None:
        """What an action needs is earlier in its stage's list, and so is what it sends."""
        for code, position in self.at.items():
            for distance in self.before[code % self.codes.size]:
                needed = code + distance
                if self.at.get(needed, -1) > position:
                    action, other = self.codes.actions((code, needed))
                    self._fault(f"{action} comes before {other}, which it needs", self._places(code, needed))

    def _check_ends(self) -> None:
        """A stage ends with its reduce and its step, after all other work of the batch."""
        for stage, end in enumerate(self.ends):
            actions, codes = self.program.stages[stage], [self.codes.of(action) for action in end]
            last = actions[-len(end) :] if end else ()
            if last != end and all(code in self.at for code in codes):
                must, does = (" ".join(map(str, some)) for some in (end, last))
                text = f"stage {stage} must end with {must}, it ends with {does}"
                self._fault(text, self._places(*codes))

    def _check_links(self) -> None:
        """A link delivers messages in the order they are sent: both its ends agree on it."""
        codes = self.codes
        for stage, order in enumerate(self.order):
            for kind in sorted(SEND_KINDS):
                distances = [codes.receive[op] * (each.kind is kind) for op, each in enumerate(codes.ops)]
                sends = {code + d: code for code in order if (d := distances[code % codes.size])}
                sends = {receive: send for receive, send in sends.items() if receive in self.at}
                if sends:
                    other = codes.ops[next(iter(sends)) % codes.size].stage
                    taken = [sends[code] for code in self.order[other] if code in sends]
                    self._compare([*sends.values()], taken, f"stage {stage} sends", f"stage {other} receives")
        load = codes.of(Action(0, Kind.LOAD, 0))
        loads = [code for code in self.order[0] if code % codes.size == load]
        self._compare(loads, sorted(loads), "stage 0 loads", "the data set has")

    def _compare(self, ours: Sequence[int], theirs: Sequence[int], we: str, they: str) -> None:
        wrong = [(mine, other) for mine, other in zip(ours, theirs, strict=False) if mine != other]
        if wrong:
            sent, taken = (
                ", ".join(map(str, map(self.codes.action, each))) for each in zip(*wrong, strict=True)
            )
            receives = {mine + self.codes.receive[mine % self.codes.size] for mine, _ in wrong}
            places = self._places(*receives.union(mine for mine, _ in wrong))
            self._fault(f"{we} {sent} where {they} {taken}, in this order", places)

    def _check_buffers(self) -> None:
        """No more micro-batches at once than slots, and no two of them in one buffer."""
        buffers: dict[int, int] = {}
        for stage, slots in enumerate(self.program.slots):
            for code, live in self.codes.micro_batch_starts(self.order[stage]):
                action = self.codes.action(code)
                buffers[code] = self.program.buffer(action)
                clash = [other for other in live if buffers[other] == buffers[code]]
                if len(live) >= slots:
                    text = f"begins micro-batch {len(live) + 1} at once on stage {stage}, slots: {slots}"
                    self._fault(f"{action} {text}", self._places(code))
                elif clash:
                    filled = self.codes.action(clash[0])
                    text = f"{action} takes the buffer that {filled} filled and that is still in use"
                    self._fault(text, self._places(code, clash[0]))
