"""A program in DeepSpeed's terms."""

import pytest
from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

from ds_interlock import GradientFlowPlan
from ds_interlock.engine.instructions import HeadPass, InterlockSchedule, RelayPass, WeightGradPass
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.program import evaluation_program, training_program

PLAN = GradientFlowPlan.n_wise(4, 2)
"""trained_by = {0}, {0, 1}, {1, 2}, {2}; loss 0 at the end of stage 1, loss 1 of stage 2, loss 2 final."""


def words(schedule: InterlockSchedule) -> list[str]:
    """Each instruction by its class and action."""
    return [
        f"{instruction.name} {instruction.action}" if hasattr(instruction, "action") else instruction.name
        for (instruction,) in schedule
    ]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("num_micro_batches", [1, 5])
def test_it_is_a_pipe_schedule_of_pipe_instructions(stage, num_micro_batches):
    program = training_program(PLAN, num_micro_batches)
    schedule = InterlockSchedule(program, stage)
    assert isinstance(schedule, PipeSchedule)
    assert schedule.num_micro_batches == num_micro_batches
    assert schedule.num_pipe_buffers() == PLAN.in_flight(stage)
    steps = list(schedule)
    assert all(isinstance(instruction, PipeInstruction) for step in steps for instruction in step)
    assert [step[0].action for step in steps[:-2]] == list(program.stages[stage][:-2])
    assert isinstance(steps[-2][0], deepspeed_schedule.ReduceGrads)
    assert isinstance(steps[-1][0], deepspeed_schedule.OptimizerStep)


def test_the_words_of_a_stage_with_head_and_relay():
    assert words(InterlockSchedule(training_program(PLAN, 1), 1)) == [
        "RecvGrad 1RECV_I0@1",
        "RecvActivation 1RECV_F0",
        "ForwardPass 1F0",
        "SendActivation 1SEND_F0",
        "HeadPass 1H0@0",
        "RelayPass 1I0@0",
        "SendGrad 1SEND_I0@0",
        "WeightGradPass 1W0",
        "ReduceGrads",
        "OptimizerStep",
    ]


def test_under_global_a_stage_does_both_backward_halves_at_once():
    schedule = InterlockSchedule(training_program(GradientFlowPlan.end_to_end(3), 2), 1)
    classes = {type(instruction) for (instruction,) in schedule}
    assert deepspeed_schedule.BackwardPass in classes
    assert not classes & {HeadPass, RelayPass, WeightGradPass}


@pytest.mark.parametrize("window", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", range(4))
def test_every_receive_is_taken_once_and_after_it_was_posted(window, stage):
    schedule = InterlockSchedule(training_program(GradientFlowPlan.n_wise(4, window), 6), stage)
    posted: list[Action] = []
    taken: list[Action] = []
    for (instruction,) in schedule:
        if isinstance(instruction, deepspeed_schedule.RecvActivation | deepspeed_schedule.RecvGrad):
            posted.append(instruction.action)
        for receive in getattr(instruction, "takes", ()):
            assert receive in posted
            taken.append(receive)
    assert sorted(taken) == sorted(posted)
    assert len(set(taken)) == len(taken)


def test_evaluation_has_heads_only_if_they_are_asked_for():
    def heads(all_heads: bool) -> list[str]:
        program = evaluation_program(PLAN, 2, all_heads=all_heads)
        return [
            str(instruction.action)
            for stage in range(4)
            for (instruction,) in InterlockSchedule(program, stage)
            if isinstance(instruction, HeadPass)
        ]

    assert heads(all_heads=False) == ["3H0@2", "3H1@2"]
    assert heads(all_heads=True) == ["1H0@0", "1H1@0", "2H0@1", "2H1@1", "3H0@2", "3H1@2"]
    program = evaluation_program(PLAN, 2, all_heads=True)
    kinds = {action.kind for actions in program.stages for action in actions}
    assert not kinds & {Kind.STEP, Kind.REDUCE, Kind.WEIGHT_GRADIENT, Kind.INPUT_GRADIENT, Kind.BACKWARD}
