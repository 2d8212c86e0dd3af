"""A program in DeepSpeed's terms: a ``PipeSchedule`` that yields ``PipeInstruction`` objects.

Three instructions are our own, the others DeepSpeed's. Each carries the ``Action`` it stands for, and the
receives whose messages it is the first to need.
"""

from collections.abc import Iterator

from deepspeed.runtime.pipe import engine
from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from deepspeed.runtime.pipe.schedule import BufferOpInstruction, PipeInstruction, PipeSchedule
from deepspeed.utils import timer

from ds_interlock.schedule.action import RECV_KINDS, SEND_KINDS, Kind
from ds_interlock.schedule.lower import Program
from ds_interlock.stage.interpreter import Step, receive_ahead, steps


class HeadPass(BufferOpInstruction):
    """Forward and backward of a loss head; its input counts as a constant."""


class RelayPass(BufferOpInstruction):
    """Input gradient of the stage, without weight gradients, for one loss or a sum of losses."""


class WeightGradPass(BufferOpInstruction):
    """Weight gradient of the stage for all losses that train it."""


INSTRUCTIONS: dict[Kind, type[BufferOpInstruction]] = {
    Kind.FORWARD: deepspeed_schedule.ForwardPass,
    Kind.HEAD: HeadPass,
    Kind.INPUT_GRADIENT: RelayPass,
    Kind.WEIGHT_GRADIENT: WeightGradPass,
    Kind.BACKWARD: deepspeed_schedule.BackwardPass,
    Kind.LOAD: deepspeed_schedule.LoadMicroBatch,
    Kind.SEND_FORWARD: deepspeed_schedule.SendActivation,
    Kind.RECV_FORWARD: deepspeed_schedule.RecvActivation,
    Kind.SEND_GRADIENT: deepspeed_schedule.SendGrad,
    Kind.RECV_GRADIENT: deepspeed_schedule.RecvGrad,
}
"""The instruction of each action, but those that end a batch."""


_FORWARD = timer.FORWARD_MICRO_TIMER, timer.FORWARD_GLOBAL_TIMER
_BACKWARD = (
    *(timer.BACKWARD_MICRO_TIMER, timer.BACKWARD_GLOBAL_TIMER),
    *(timer.BACKWARD_INNER_MICRO_TIMER, timer.BACKWARD_INNER_GLOBAL_TIMER),
)
TIMERS: dict[Kind, tuple[str, ...]] = {
    Kind.FORWARD: _FORWARD,
    **dict.fromkeys((Kind.HEAD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.BACKWARD), _BACKWARD),
    Kind.LOAD: (engine.BATCH_INPUT_TIMER,),
    Kind.SEND_FORWARD: (engine.PIPE_SEND_OUTPUT_TIMER,),
    Kind.RECV_FORWARD: (engine.PIPE_RECV_INPUT_TIMER,),
    Kind.SEND_GRADIENT: (engine.PIPE_SEND_GRAD_TIMER,),
    Kind.RECV_GRADIENT: (engine.PIPE_RECV_GRAD_TIMER,),
    Kind.REDUCE: (timer.BACKWARD_REDUCE_MICRO_TIMER, timer.BACKWARD_REDUCE_GLOBAL_TIMER),
}
"""DeepSpeed's timers of each action; a head's forward pass counts as its backward pass."""

MESSAGE_TIMERS = [name for kind in SEND_KINDS | RECV_KINDS for name in TIMERS[kind]]


class InterlockSchedule(PipeSchedule):
    """What one stage does for one batch, one action in each step."""

    def __init__(self, program: Program, stage: int) -> None:
        super().__init__(program.num_micro_batches, program.plan.num_stages, stage)
        self.program = program
        neighbours = {stage - 1, stage + 1} & set(range(program.plan.num_stages))
        self.receive_ahead = max((receive_ahead(program, neighbour) for neighbour in neighbours), default=0)
        self.instructions = [self._instruction(step) for step in steps(program, stage)]

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yields a list of one instruction in each step, as DeepSpeed's engine expects them."""
        for instruction in self.instructions:
            yield [instruction]

    def num_pipe_buffers(self) -> int:
        """Micro-batches in flight on this stage."""
        return self.program.slots[self.stage_id]

    def _instruction(self, step: Step) -> PipeInstruction:
        action, takes = step
        if action.kind is Kind.REDUCE:
            return deepspeed_schedule.ReduceGrads()
        if action.kind is Kind.STEP:
            return deepspeed_schedule.OptimizerStep()
        instruction = INSTRUCTIONS[action.kind]
        return instruction(self.program.buffer(action), action=action, takes=takes)
