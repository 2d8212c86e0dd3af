"""Which loss trains which stage, and what follows from it: the order of work, its cost, its picture.

Pure Python: nothing here knows torch or DeepSpeed.
"""

from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.dependency import dependencies, stage_actions
from ds_interlock.schedule.lower import Program, evaluation_program, training_program
from ds_interlock.schedule.order import compute_order
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead
from ds_interlock.schedule.render import Timeline, render_svg, render_text
from ds_interlock.schedule.simulate import Span, StandstillError, simulate
from ds_interlock.schedule.verify import verify, verify_evaluation

__all__ = [
    "Action",
    "CostModel",
    "GradientFlowPlan",
    "Kind",
    "LossHead",
    "Program",
    "Span",
    "StandstillError",
    "Timeline",
    "compute_order",
    "dependencies",
    "evaluation_program",
    "render_svg",
    "render_text",
    "simulate",
    "stage_actions",
    "training_program",
    "verify",
    "verify_evaluation",
]
