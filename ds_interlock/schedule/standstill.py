"""Do the stages come to wait for each other? The answer is the same whatever anything costs.

A program is run by *agents*, each of which does things in a fixed order: it passes marks, and waits for
marks that others pass. A stage's *host* runs the program. It announces messages (their headers):

    host 0     ..., mark: sent 1F0, wait: posted 1F0, ...
    host 1     ..., mark: posted 1F0, ..., wait: sent 1F0, work on 1F0, ...

Hosts are all that counts if payloads between devices travel by the rule of docs/design.md, section 3
(``tests/helpers/payloads.py`` is a model of it, and of what happens without it).
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule.action import Action
from ds_interlock.schedule.codes import Codes

Place = tuple[int, int]
"""A place in a program: the stage in whose list it is, and the position in the list."""

Agent = tuple[int, str]
"""A stage, and which of its agents."""

_NOBODY = (-1, ""), 1


class StandstillError(ScheduleError):
    """The stages wait for each other, each at one of ``places``."""

    def __init__(self, places: Sequence[Place], stages: Sequence[Sequence[Action]]) -> None:
        self.places = tuple(places)
        waiting = ", ".join(str(stages[stage][position]) for stage, position in places)
        super().__init__(f"the stages wait for each other: none of {waiting} can start")


class Agents:
    """Agents by name, and what each does, in the order in which it is added."""

    def __init__(self) -> None:
        self.waits: dict[Agent, list[Hashable]] = defaultdict(list)
        self.passed: dict[Hashable, tuple[Agent, int]] = {}  # by whom, after how many of its waits

    def passes(self, agent: Agent, mark: Hashable) -> None:
        self.passed[mark] = agent, len(self.waits[agent])

    def waits_for(self, agent: Agent, mark: Hashable) -> None:
        self.waits[agent].append(mark)

    def stuck(self) -> dict[Agent, int]:
        """The agents that do not finish, and at which of its waits each stands."""
        done = dict.fromkeys(self.waits, 0)
        waiting: dict[Agent, list[Agent]] = defaultdict(list)
        todo = list(done)
        while todo:
            agent = todo.pop()
            number, waits = done[agent], self.waits[agent]
            while number < len(waits):
                other, needed = self.passed.get(waits[number], _NOBODY)
                if done.get(other, 0) < needed:
                    waiting[other].append(agent)
                    break
                number += 1
            if number > done[agent]:
                done[agent] = number
                todo += waiting.pop(agent, ())
        return {agent: number for agent, number in done.items() if number < len(self.waits[agent])}


def standstill(codes: Codes, rows: Sequence[Sequence[int]]) -> list[Place]:
    """Where stages stand still if every send waits until its receive is posted; empty if all finish.

    If nobody stands still, batches of any programs may follow each other: all messages of a batch are posted
    and taken in it, so no stage ever waits for what another one does in a later batch.

    Args:
        codes: Of the plan.
        rows: For each stage the codes of its actions.
    """
    agents = Agents()
    places: list[list[int]] = []
    for stage, row in enumerate(rows):
        places.append([])
        host = stage, "host"
        for position, code in enumerate(row):
            op = code % codes.size
            # Of a message, its receive's code is the mark that it is posted, and ~code that it is sent.
            waits: list[int] = []
            if codes.is_receive[op]:
                agents.passes(host, code)
            elif codes.receive[op]:
                waits = [code + codes.receive[op]]
                agents.passes(host, ~waits[0])
            elif codes.takes[op]:
                waits = [~(code + distance) for distance in codes.takes[op]]
            for mark in waits:
                agents.waits_for(host, mark)
                places[stage].append(position)
    return [(stage, places[stage][number]) for (stage, _), number in sorted(agents.stuck().items())]
