"""How long an action takes and how many bytes a message has. Shared by order, simulator and planner."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.plan import GradientFlowPlan

PerStage = float | Sequence[float]


@dataclass(frozen=True)
class CostModel:
    """Costs of one micro-batch on one stage, in any unit of time (seconds, or multiples of a forward).

    A value is one number for all stages or a sequence with one for each stage. Work on part of a
    stage (up to a head within it) costs the share of the layers it runs, by ``layer_weights``.

    Attributes:
        forward: Forward through the stage.
        input_gradient: Gradient with respect to the stage's input. A relay is this alone.
        weight_gradient: Gradient with respect to the weights, on top of the gradients between the
            layers: a backward pass for the weights costs ``input_gradient + weight_gradient``.
        head: Forward and backward of one auxiliary head.
        final_head: The same of the model's own loss (its unembedding is a layer like any other).
        optimizer: Optimizer step of the stage's layers, once per batch.
        head_optimizer: Optimizer step of one auxiliary head, once per batch.
        latency: Time a message takes however small it is.
        bandwidth: Bytes per unit of time of one link, in one direction.
        forward_bytes: Size of the activations and labels a stage sends to the next one.
        gradient_bytes: Size of one gradient that a stage relays to the previous one.
        layer_weights: For each layer of the model its cost in proportion to the others; None if all
            cost the same.
    """

    forward: PerStage = 1.0
    input_gradient: PerStage = 1.0
    weight_gradient: PerStage = 1.0
    head: PerStage = 0.3
    final_head: float = 0.0
    optimizer: PerStage = 0.0
    head_optimizer: PerStage = 0.0
    latency: float = 0.0
    bandwidth: float = float("inf")
    forward_bytes: PerStage = 0.0
    gradient_bytes: PerStage = 0.0
    layer_weights: Sequence[float] | None = None

    def seconds(self, plan: GradientFlowPlan, action: Action) -> float:
        """Time ``action`` keeps its stage busy. Communication keeps no stage busy."""
        stage = action.stage
        match action.kind:
            case Kind.FORWARD:
                return _at(self.forward, stage) * self._forward_share(plan, action)
            case Kind.HEAD:
                return self.final_head if action.losses[0] == plan.final else _at(self.head, stage)
            case Kind.INPUT_GRADIENT:
                return _at(self.input_gradient, stage) * self._relay_share(plan, action)
            case Kind.WEIGHT_GRADIENT | Kind.BACKWARD:
                return _at(self.input_gradient, stage) + _at(self.weight_gradient, stage)
            case Kind.STEP:
                num_heads = sum(loss != plan.final for loss in plan.losses_at(stage))
                return _at(self.optimizer, stage) + num_heads * _at(self.head_optimizer, stage)
            case _:
                return 0.0

    def message_bytes(self, action: Action) -> float:
        """Size of the message that the send ``action`` puts on its link."""
        size = self.forward_bytes if action.kind is Kind.SEND_FORWARD else self.gradient_bytes
        return _at(size, action.stage)

    def message_seconds(self, action: Action) -> float:
        """Time from the start of the send ``action``, both sides being ready, to its arrival."""
        return self.latency + self.message_bytes(action) / self.bandwidth

    def _forward_share(self, plan: GradientFlowPlan, action: Action) -> float:
        """The share of the stage's layers that this part of its forward runs."""
        first, end = plan.stage_bounds[action.stage], plan.stage_bounds[action.stage + 1]
        cuts = [plan.heads[loss].after_layer for loss in plan.losses_at(action.stage) if plan.is_inner(loss)]
        stop = plan.heads[action.losses[0]].after_layer if action.losses else end
        start = max((cut for cut in cuts if cut < stop), default=first)
        return self._share(plan, action.stage, start, stop)

    def _relay_share(self, plan: GradientFlowPlan, action: Action) -> float:
        """A gradient from the next stage crosses all layers, one from an inner head those before it."""
        heads = [plan.heads[loss] for loss in action.losses]
        if any(head.stage != action.stage for head in heads):
            return 1.0
        start, stop = plan.stage_bounds[action.stage], max(head.after_layer for head in heads)
        return self._share(plan, action.stage, start, stop)

    def _share(self, plan: GradientFlowPlan, stage: int, start: int, stop: int) -> float:
        """The share of ``stage`` that its layers ``start .. stop - 1`` make up."""
        first, end = plan.stage_bounds[stage], plan.stage_bounds[stage + 1]
        if self.layer_weights is None:
            return (stop - start) / (end - first)
        whole = sum(self.layer_weights[first:end])
        return sum(self.layer_weights[start:stop]) / whole if whole else 0.0


class LinkTimes:
    """When messages arrive. Those of one link and direction go one after the other."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._free: dict[tuple[int, Kind], float] = defaultdict(float)
        self._seconds: dict[tuple[int, Kind], float] = {}

    def arrival(self, send: Action, ready: float) -> float:
        """When the message of ``send`` arrives, both sides being ready at ``ready``; called in link order."""
        link = send.stage, send.kind
        if link not in self._seconds:
            self._seconds[link] = self._costs.message_seconds(send)
        arrival = max(ready, self._free[link]) + self._seconds[link]
        # The latency of one message overlaps with the next; its bytes do not.
        self._free[link] = arrival - self._costs.latency
        return arrival


def _at(value: PerStage, stage: int) -> float:
    return value if isinstance(value, int | float) else value[stage]
