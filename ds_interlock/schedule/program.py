"""The programs that are run: ordered, lowered and verified."""

from functools import lru_cache

from ds_interlock.schedule.codes import codes_of
from ds_interlock.schedule.dependency import batch_end, evaluation_actions
from ds_interlock.schedule.lower import Program, lower
from ds_interlock.schedule.order import compute_order
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.verify import verify, verify_evaluation


@lru_cache(maxsize=16)  # called at every batch
def training_program(plan: GradientFlowPlan, num_micro_batches: int, *, extra_in_flight: int = 0) -> Program:
    """The program of one training batch.

    Raises:
        ScheduleError: If there is none in which the stages never wait for each other.
    """
    codes = codes_of(plan)
    order = compute_order(plan, num_micro_batches, extra_in_flight=extra_in_flight)
    for stage, row in enumerate(order):
        row += map(codes.of, batch_end(stage, num_micro_batches))
    slots = tuple(plan.in_flight(stage) + extra_in_flight for stage in range(plan.num_stages))
    program = Program(plan, num_micro_batches, slots, lower(codes, order))
    verify(program, extra_in_flight=extra_in_flight)
    return program


@lru_cache(maxsize=16)
def evaluation_program(plan: GradientFlowPlan, num_micro_batches: int, *, all_heads: bool) -> Program:
    """Forward only: the final loss of every micro-batch, or with ``all_heads`` every head's."""
    codes = codes_of(plan)
    work = [
        [
            codes.of(a)
            for n in range(num_micro_batches)
            for a in evaluation_actions(plan, stage, n, all_heads=all_heads)
        ]
        for stage in range(plan.num_stages)
    ]
    program = Program(plan, num_micro_batches, (1,) * plan.num_stages, lower(codes, work))
    verify_evaluation(program, all_heads=all_heads)
    return program
