"""An action: what one stage does for one micro-batch, and its text form.

The field's letters name the work, as in ``torch.distributed.pipelining``:

    2F0       stage 2: forward of micro-batch 0 (to the end of the stage)
    2F0@3     forward only as far as the head of loss 3, which sits within the stage
    2H0@3     forward and backward of that head; its input counts as a constant
    2I0@3     input gradient of loss 3 alone: a relay; of a sum of losses: 2I0@3+4
    2W0       weight gradient of the stage
    2B0       both at once, where all that trains the stage also travels on as one sum
    2S4       optimizer step, once 4 micro-batches are accumulated

Lowering adds what surrounds the work:

    0LOAD0    stage 0 reads a micro-batch
    1SEND_F0  1RECV_F0       activations and labels, downstream
    1SEND_I0@3  0RECV_I0@3   gradients, upstream
    1SEND_C0  0RECV_C0       a copy of the unembedding, upstream, between batches: in no program
    1REDUCE4  all-reduce of the accumulated gradients over the stage's data-parallel replicas
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from ds_interlock.errors import ScheduleError


class Kind(StrEnum):
    """What an action does. The value is its spelling in the text form."""

    FORWARD = "F"
    HEAD = "H"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    BACKWARD = "B"
    STEP = "S"
    LOAD = "LOAD"
    SEND_FORWARD = "SEND_F"
    RECV_FORWARD = "RECV_F"
    SEND_GRADIENT = "SEND_I"
    RECV_GRADIENT = "RECV_I"
    SEND_COPY = "SEND_C"
    RECV_COPY = "RECV_C"
    REDUCE = "REDUCE"


COMPUTE_KINDS = frozenset(
    {Kind.FORWARD, Kind.HEAD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD, Kind.STEP}
)
SEND_KINDS = frozenset({Kind.SEND_FORWARD, Kind.SEND_GRADIENT})
RECV_KINDS = frozenset({Kind.RECV_FORWARD, Kind.RECV_GRADIENT})

_TEXT = re.compile(rf"(\d+)({'|'.join(sorted(Kind, key=len, reverse=True))})(\d+)(?:@(\d+(?:\+\d+)*))?")


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """One thing one stage does."""

    stage: int
    kind: Kind
    micro_batch: int  # of the batch; for STEP and REDUCE: how many are accumulated before it
    losses: tuple[int, ...] = ()  # indices into plan.heads, rising; empty where there is no choice

    def __str__(self) -> str:
        losses = "@" + "+".join(map(str, self.losses)) if self.losses else ""
        return f"{self.stage}{self.kind.value}{self.micro_batch}{losses}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The action that prints as ``text``, or a ScheduleError if nothing does."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ScheduleError(f"{text!r} is not an action: expected a form like 2F0, 2I0@3 or 1SEND_F0")
        stage, kind, micro_batch, losses = match.groups()
        numbers = map(int, losses.split("+")) if losses else ()
        return cls(int(stage), Kind(kind), int(micro_batch), tuple(numbers))
