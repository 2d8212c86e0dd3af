"""What the layers of a model that is cut into stages cost beside each other.

Costs are in *units*: one is the mean forward of a stage for a micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.plan import GradientFlowPlan


@dataclass(frozen=True)
class LayerCosts:
    """A layer's passes, in units.

    Attributes:
        forward: Of one micro-batch.
        input_gradient: Of a relay through the layer; 0 of the first one, whose input is data.
        weight_gradient: What a backward pass for the weights costs beyond the input gradient.
    """

    forward: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True)
class StagedModel:
    """The costs of a model that is cut into stages, without those of auxiliary heads.

    Attributes:
        stage_bounds: Where it is cut: ``num_stages + 1`` rising layer numbers.
        layers: Of every layer.
        loss: Of the final loss, forward and backward, in units. It belongs to the last stage.
    """

    stage_bounds: tuple[int, ...]
    layers: tuple[LayerCosts, ...]
    loss: float

    def stage_sums(self, name: str) -> list[float]:
        """For each stage the sum over its layers of the cost called ``name``, in units."""
        costs = [getattr(layer, name) for layer in self.layers]
        return [float(sum(costs[start:stop])) for start, stop in pairwise(self.stage_bounds)]

    def cost_model(self, plan: GradientFlowPlan, heads: Mapping[int, float]) -> CostModel:
        """What the simulator needs, in units.

        Args:
            plan: The gradient flow.
            heads: The cost of every auxiliary head by its ``after_layer``, in units.
        """
        of_stages = [0.0] * plan.num_stages
        for place in plan.heads[:-1]:
            of_stages[place.stage] = heads[place.after_layer]
        return CostModel.of_layers(
            self.stage_bounds,
            forward=[layer.forward for layer in self.layers],
            input_gradient=[layer.input_gradient for layer in self.layers],
            weight_gradient=[layer.weight_gradient for layer in self.layers],
            head=of_stages,
            final_head=self.loss,
        )

    @property
    def floor(self) -> float:
        """A micro-batch without a bubble and without extra work: the slowest stage's own, in units."""
        passes = [self.stage_sums(name) for name in ("forward", "input_gradient", "weight_gradient")]
        *others, last = (sum(of_stage) for of_stage in zip(*passes, strict=True))
        return float(max(*others, last + self.loss))
