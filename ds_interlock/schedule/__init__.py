"""Which loss trains which stage, and what follows from it: the order of work, its cost, its picture.

Pure Python: nothing here knows torch or DeepSpeed.
"""

from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.program import evaluation_program, training_program
from ds_interlock.schedule.render import Timeline, render_svg
from ds_interlock.schedule.simulate import simulate
from ds_interlock.schedule.verify import verify, verify_evaluation

__all__ = [
    "CostModel",
    "GradientFlowPlan",
    "Program",
    "Timeline",
    "evaluation_program",
    "render_svg",
    "simulate",
    "training_program",
    "verify",
    "verify_evaluation",
]
