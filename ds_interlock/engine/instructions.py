"""A program in DeepSpeed's terms: a ``PipeSchedule`` that yields ``PipeInstruction`` objects.

The work itself is DeepSpeed's ``ForwardPass`` and ``BackwardPass`` and three instructions of our
own; loads, sends, receives, reduction and step are DeepSpeed's. Each carries the ``Action`` it
stands for, and each piece of work the receives it has to wait for.
"""

from collections.abc import Iterator

from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from deepspeed.runtime.pipe.schedule import BufferOpInstruction, PipeInstruction, PipeSchedule

from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.lower import Program, receives_needed


class HeadPass(BufferOpInstruction):
    """Forward and backward of a loss head; its input counts as a constant."""


class RelayPass(BufferOpInstruction):
    """Input gradient of the stage, without weight gradients, for one loss or a sum of losses."""


class WeightGradPass(BufferOpInstruction):
    """Weight gradient of the stage for all losses that train it."""


WORK: dict[Kind, type[BufferOpInstruction]] = {
    Kind.FORWARD: deepspeed_schedule.ForwardPass,
    Kind.HEAD: HeadPass,
    Kind.INPUT_GRADIENT: RelayPass,
    Kind.WEIGHT_GRADIENT: WeightGradPass,
    Kind.BACKWARD: deepspeed_schedule.BackwardPass,
}
AROUND: dict[Kind, type[BufferOpInstruction]] = {
    Kind.LOAD: deepspeed_schedule.LoadMicroBatch,
    Kind.SEND_FORWARD: deepspeed_schedule.SendActivation,
    Kind.RECV_FORWARD: deepspeed_schedule.RecvActivation,
    Kind.SEND_GRADIENT: deepspeed_schedule.SendGrad,
    Kind.RECV_GRADIENT: deepspeed_schedule.RecvGrad,
}


class InterlockSchedule(PipeSchedule):
    """What one stage does for one batch, a step an action."""

    def __init__(self, program: Program, stage: int) -> None:
        super().__init__(program.num_micro_batches, program.plan.num_stages, stage)
        self.program = program
        taken: set[Action] = set()
        self.instructions = [self._instruction(action, taken) for action in program.stages[stage]]

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yields one list of instructions a step, as DeepSpeed's engine expects them."""
        for instruction in self.instructions:
            yield [instruction]

    def num_pipe_buffers(self) -> int:
        """Micro-batches in flight on this stage."""
        return self.program.slots[self.stage_id]

    def _instruction(self, action: Action, taken: set[Action]) -> PipeInstruction:
        if action.kind is Kind.REDUCE:
            return deepspeed_schedule.ReduceGrads()
        if action.kind is Kind.STEP:
            return deepspeed_schedule.OptimizerStep()
        buffer_id = self.program.buffer(action)
        if action.kind in AROUND:
            return AROUND[action.kind](buffer_id, action=action)
        takes = tuple(r for r in receives_needed(self.program.plan, action) if r not in taken)
        taken.update(takes)
        return WORK[action.kind](buffer_id, action=action, takes=takes)
