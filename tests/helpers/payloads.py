"""A model of payloads that travel between devices: can they make stages wait for each other?

Each stage has three kinds of agents (``standstill.Agents``). Its host runs the program, announces messages
by their headers, and has payloads sent and received. Its stream computes what the host has issued, in that
order. Each of its communicators is a queue of payloads; one moves when it heads the queues of both ends:

    host 0     ..., sent m, offer m ─────► queue 0: made m, offered m, wait: accepted m
    host 1     ..., wait: sent m, accept m ─► queue 1: accepted m, wait: offered m, taken m ─► stream 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.codes import Codes
from ds_interlock.schedule.standstill import Agent, Agents


@dataclass(frozen=True)
class Transport:
    """How payloads travel between devices. By default by the rule that never stands still.

    Attributes:
        sender_waits: What a host waits for at a send: that the receive is ``"posted"``, or that the payload
            is ``"taken"``.
        queue: Which payloads share a communicator.
        primed: Whether communicators exist from the start; if not, a host that first uses one waits until
            the host at the other end does.
    """

    sender_waits: Literal["posted", "taken"] = "posted"
    queue: Literal["link and direction", "link", "direction"] = "link and direction"
    primed: bool = True

    def stuck(self, batches: Sequence[tuple[Codes, Sequence[Sequence[int]]]]) -> dict[Agent, int]:
        """The agents that do not finish ``batches``, each the arguments of ``standstill``, one after another.

        A receive is issued as late as may be: when the work takes its message.
        """
        agents = Agents()
        for batch, (codes, rows) in enumerate(batches):
            for stage, row in enumerate(rows):
                _Device(self, agents, codes, batch, stage).run(row)
        return agents.stuck()


class _Device:
    """The agents of a stage in one batch."""

    def __init__(self, transport: Transport, agents: Agents, codes: Codes, batch: int, stage: int) -> None:
        self.transport, self.agents, self.codes = transport, agents, codes
        self.batch, self.stage = batch, stage
        self.host, self.stream = (stage, "host"), (stage, "stream")
        self.posted: list[int] = []
        self.maker: dict[int, int] = {}

    def run(self, row: Sequence[int]) -> None:
        codes = self.codes
        for code in row:
            op = code % codes.size
            if codes.is_receive[op]:
                self.posted.append(code)
                self._pass(self.host, "posted", code)
            elif codes.receive[op]:
                message = code + codes.receive[op]
                self._pass(self.host, "sent", message)
                queue = self._issue(message, "offer")
                self._wait(queue, "made", self.maker[code])
                self._move(queue, message, "offered", "accepted")
                self._wait(self.host, self.transport.sender_waits, message)
            else:
                self._compute(code, [code + distance for distance in codes.takes[op]])
                self.maker[code + codes.send[op]] = code

    def _compute(self, code: int, takes: Sequence[int]) -> None:
        for message in takes:
            while message in self.posted:  # those sent earlier on its link come first
                link = self._link(message)
                first = next(each for each in self.posted if self._link(each) == link)
                self.posted.remove(first)
                self._wait(self.host, "sent", first)
                self._move(self._issue(first, "accept"), first, "accepted", "offered")
        self._pass(self.host, "issued", code)
        self._wait(self.stream, "issued", code)
        for message in takes:
            self._wait(self.stream, "taken", message)
        self._pass(self.stream, "made", code)

    def _issue(self, message: int, what: str) -> Agent:
        """The host has a payload sent or received; returns the queue that it goes into."""
        link, direction = self._link(message)
        names = {"link and direction": f"{direction} {link}", "link": f"{link}", "direction": direction}
        queue = self.stage, names[self.transport.queue]
        if not self.transport.primed:
            peer = 2 * link + 1 - self.stage
            self.agents.passed.setdefault((queue, link), (self.host, len(self.agents.waits[self.host])))
            self.agents.waits_for(self.host, ((peer, queue[1]), link))
        self._pass(self.host, what, message)
        self._wait(queue, what, message)
        return queue

    def _move(self, queue: Agent, message: int, ours: str, theirs: str) -> None:
        self._pass(queue, ours, message)
        self._wait(queue, theirs, message)
        if ours == "accepted":
            self._pass(queue, "taken", message)

    def _link(self, message: int) -> tuple[int, str]:
        """The first stage of its link, and its direction."""
        receive = self.codes.ops[message % self.codes.size]
        is_forward = receive.kind is Kind.RECV_FORWARD
        return receive.stage - is_forward, "forward" if is_forward else "gradient"

    def _pass(self, agent: Agent, what: str, code: int) -> None:
        self.agents.passes(agent, (self.batch, what, code))

    def _wait(self, agent: Agent, what: str, code: int) -> None:
        self.agents.waits_for(agent, (self.batch, what, code))
