"""The gradient-flow plan: which loss trains which stage. Everything else derives from it.

A deep model is cut into K stages. A *head* turns the hidden state after some layer into a loss; the
last head is the model's own output and loss. The plan says, for every stage k, the set
``trained_by[k]`` of losses whose gradient reaches its weights. With four stages, window 2 and
``combine="sum"`` (an arrow is a loss reaching back over the stages it trains):

      stage 0     stage 1     stage 2     stage 3
    ==========  ==========  ==========  ==========
    <----------------------o 0                        loss 0, at the end of stage 1
                <----------------------o 1            loss 1, at the end of stage 2
                            <----------------------o 2      the final loss

    trained_by = {0}, {0, 1}, {1, 2}, {2}

Local learning is the same picture with arrows one stage long, ordinary ("global") backpropagation
with one arrow as long as the pipeline. A stage that an arrow crosses on its way to an upstream stage
*relays* it: it computes the input gradient and sends it upstream.

Source: Gomez, Key, Perlin, Gou, Frosst, Dean, Gal: Interlocking Backpropagation: Improving
depthwise model-parallelism. JMLR 23(171), 2022. Fractional windows are this project's own.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Literal, Self

from ds_interlock.errors import PlanError, list_faults
from ds_interlock.schedule.action import Kind

Combine = Literal["sum", "farthest"]


@dataclass(frozen=True)
class LossHead:
    """Where one loss is computed.

    Attributes:
        stage: The stage that computes it.
        after_layer: Number of layers before it, counted over the whole model.
        weight: Factor of this loss in every gradient it takes part in, its own head's included.
    """

    stage: int
    after_layer: int
    weight: float = 1.0


@dataclass(frozen=True)
class GradientFlowPlan:
    """Which loss trains which stage. Stores only what cannot be computed.

    Attributes:
        stage_bounds: ``num_stages + 1`` rising layer numbers; stage k owns the layers
            ``stage_bounds[k] .. stage_bounds[k + 1] - 1``.
        heads: The losses, in the order of their layers. The last one is the final loss.
        trained_by: For each stage the indices into ``heads`` of the losses that train it.

    Raises:
        PlanError: Listing every fault, if the three do not fit together.
    """

    stage_bounds: tuple[int, ...]
    heads: tuple[LossHead, ...]
    trained_by: tuple[frozenset[int], ...]

    urgency: ClassVar[tuple[Kind, ...]] = (
        Kind.INPUT_GRADIENT,
        Kind.HEAD,
        Kind.FORWARD,
        Kind.BACKWARD,
        Kind.WEIGHT_GRADIENT,
    )
    """Which work a stage does first when several are ready. A subclass may have another order."""

    # Constructors. Each takes `num_stages` (one layer a stage) or `stage_bounds`.

    @classmethod
    def local(cls, num_stages: int | None = None, *, stage_bounds: Sequence[int] | None = None) -> Self:
        """Every stage is trained by the loss at its end: no stage waits for another."""
        return cls.n_wise(num_stages, 1, stage_bounds=stage_bounds)

    @classmethod
    def end_to_end(cls, num_stages: int | None = None, *, stage_bounds: Sequence[int] | None = None) -> Self:
        """Ordinary backpropagation: the final loss trains every stage."""
        bounds = _bounds(num_stages, stage_bounds)
        return cls(bounds, (_final_head(bounds),), (frozenset({0}),) * (len(bounds) - 1))

    @classmethod
    def deep_supervision(
        cls,
        num_stages: int | None = None,
        *,
        stage_bounds: Sequence[int] | None = None,
        head_weight: float = 1.0,
    ) -> Self:
        """A loss at the end of every stage, each reaching back to the first layer."""
        bounds = _bounds(num_stages, stage_bounds)
        num = len(bounds) - 1
        heads = [LossHead(stage, bounds[stage + 1], head_weight) for stage in range(num - 1)]
        trained_by = tuple(frozenset(range(stage, num)) for stage in range(num))
        return cls(bounds, (*heads, _final_head(bounds)), trained_by)

    @classmethod
    def n_wise(
        cls,
        num_stages: int | None = None,
        window: float = 2,
        combine: Combine = "sum",
        *,
        head_stride: int = 1,
        stage_bounds: Sequence[int] | None = None,
        head_weight: float = 1.0,
    ) -> Self:
        """Every loss reaches back over ``window`` stages; windows of neighbouring losses overlap.

        Losses sit at *slots* 1..K: slot j where stage j begins or, for a window N + f with 0 < f < 1, the
        fraction f into stage j; slot K is the final loss. Stage k is in reach of the slots k+1 .. k+N.

        Args:
            num_stages: Number of stages of one layer each; or give ``stage_bounds``.
            window: Stages one loss reaches back over, its own included: 1 .. num_stages. One stage
                alone is trained end to end, whatever the window.
            combine: ``"sum"`` trains a stage by every loss in reach that itself reaches back a
                full window; ``"farthest"`` by the last loss in reach only.
            head_stride: Build heads only at every ``head_stride``-th slot, counted from the end.
            stage_bounds: See the class.
            head_weight: ``weight`` of every head but the final one.

        Raises:
            PlanError: If no such plan exists.
        """
        bounds = _bounds(num_stages, stage_bounds)
        num = len(bounds) - 1
        _check_window(window, combine, head_stride, num)
        span = math.floor(window)
        fraction = window - span
        slots = [slot for slot in range(1, num) if (num - slot - (fraction > 0)) % head_stride == 0] + [num]
        chosen, faults = [], []
        for stage in range(num):
            in_reach = [slot for slot in slots if stage < slot <= stage + span]
            full = [slot for slot in in_reach if slot >= span]
            if not in_reach:
                faults.append(
                    f"no loss is in reach of stage {stage}: head_stride {head_stride} is too large for "
                    f"window {window}; use at most {span}"
                )
            chosen.append(full if combine == "sum" and full else in_reach[-1:])
        used = sorted(set().union(*chosen))
        heads = [_head_at(slot, fraction, bounds, head_weight, faults) for slot in used]
        if faults:
            raise PlanError(list_faults(f"window {window} over {num} stages", faults))
        index = {slot: position for position, slot in enumerate(used)}
        return cls(bounds, tuple(heads), tuple(frozenset(index[s] for s in c) for c in chosen))

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage_bounds", tuple(self.stage_bounds))
        object.__setattr__(self, "heads", tuple(self.heads))
        object.__setattr__(self, "trained_by", tuple(frozenset(s) for s in self.trained_by))
        _check_bounds(self.stage_bounds)
        faults = _faults(self)
        if faults:
            raise PlanError(list_faults("gradient-flow plan", faults))

    # What derives from it.

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages, K."""
        return len(self.stage_bounds) - 1

    @property
    def num_layers(self) -> int:
        """Number of layers of the whole model."""
        return self.stage_bounds[-1]

    @property
    def final(self) -> int:
        """Index of the final loss."""
        return len(self.heads) - 1

    @property
    def is_end_to_end(self) -> bool:
        """True if this is ordinary backpropagation: one loss, which trains every stage."""
        return len(self.heads) == 1

    def losses_at(self, stage: int) -> tuple[int, ...]:
        """Losses computed on ``stage``, in the order of their layers."""
        return tuple(i for i, head in enumerate(self.heads) if head.stage == stage)

    def is_inner(self, loss: int) -> bool:
        """True if the head sits within its stage rather than at its end."""
        head = self.heads[loss]
        return head.after_layer < self.stage_bounds[head.stage + 1]

    def relays(self, stage: int) -> tuple[int, ...]:
        """Losses whose input gradient ``stage`` sends to the previous stage."""
        return tuple(loss for bundle in self.bundles(stage) for loss in bundle)

    def bundles(self, stage: int) -> tuple[tuple[int, ...], ...]:
        """The relays of ``stage``, those that train the same upstream stages grouped together.

        The gradients of a group are never needed apart again, so they travel as one sum. Groups
        are ordered by the stage they come from: the nearest loss arrives first.
        """
        return self._bundles[stage]

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations ``stage`` needs to hold at once.

        That is one for each stage up to the farthest loss it waits for. More can be faster
        (``extra_in_flight``): under a fractional window one more removes the last wait, window 3 gains a
        little, and a slow network gains under any plan.
        """
        losses = self.trained_by[stage].union(self.relays(stage))
        return max(self.heads[loss].stage for loss in losses) - stage + 1

    @cached_property
    def merges_passes(self) -> bool:
        """True if one backward pass makes both gradients of a stage.

        That is so if every stage relays exactly what trains it, as one sum, as under global backpropagation.
        Either all stages merge their passes or none does: a merged pass would make its relay late.
        """
        return all(
            [frozenset(bundle) for bundle in self.bundles(stage)] == [self.trained_by[stage]]
            for stage in range(1, self.num_stages)
        )

    def forward_part(self, loss: int) -> tuple[int, ...]:
        """The losses of the forward action that the head of ``loss`` waits for (``Action.losses``)."""
        return (loss,) if self.is_inner(loss) else ()

    @cached_property
    def _bundles(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        bundles = []
        for stage in range(self.num_stages):
            groups: dict[frozenset[int], list[int]] = {}
            for loss, head in enumerate(self.heads):
                upstream = frozenset(s for s in range(stage) if loss in self.trained_by[s])
                if head.stage >= stage and upstream:
                    groups.setdefault(upstream, []).append(loss)
            bundles.append(tuple(sorted(map(tuple, groups.values()), key=max)))
        return tuple(bundles)


def loss_name(plan: GradientFlowPlan, loss: int) -> str:
    """How reports call the loss with this index, in every plan with a head at this position."""
    return "final_loss" if loss == plan.final else f"loss_after_layer_{plan.heads[loss].after_layer}"


def _bounds(num_stages: int | None, stage_bounds: Sequence[int] | None) -> tuple[int, ...]:
    if (num_stages is None) == (stage_bounds is None):
        raise PlanError("give either num_stages (one layer a stage) or stage_bounds, not both")
    if stage_bounds is not None:
        bounds = tuple(int(bound) for bound in stage_bounds)
        _check_bounds(bounds)
        return bounds
    assert num_stages is not None
    if num_stages < 1:
        raise PlanError(f"num_stages is {num_stages}: a pipeline has at least 1 stage")
    return tuple(range(num_stages + 1))


def _check_bounds(bounds: tuple[int, ...]) -> None:
    if len(bounds) < 2:
        raise PlanError(f"stage_bounds {list(bounds)}: at least two numbers are needed: [0, num_layers]")
    if bounds[0] != 0 or not rises(bounds):
        raise PlanError(f"stage_bounds {list(bounds)} must start at 0 and rise: every stage needs a layer")


def _final_head(bounds: tuple[int, ...]) -> LossHead:
    return LossHead(len(bounds) - 2, bounds[-1])


def _check_window(window: float, combine: str, head_stride: int, num_stages: int) -> None:
    """Raises PlanError for values that are wrong by themselves."""
    faults = []
    # One stage has no border at which a gradient could stop.
    if not 1 <= window <= (num_stages if num_stages > 1 else sys.maxsize):
        faults.append(
            f"window is {window}: it counts stages, so it must lie between 1 (local) and {num_stages}, the "
            "number of stages (global)"
        )
    if combine not in ("sum", "farthest"):
        faults.append(f'combine is {combine!r}: expected "sum" or "farthest"')
    if not (head_stride >= 1 and head_stride % 1 == 0):
        faults.append(f"head_stride is {head_stride}: expected a whole number of at least 1")
    if faults:
        raise PlanError(list_faults("gradient-flow plan", faults))


def _head_at(
    slot: int, fraction: float, bounds: tuple[int, ...], weight: float, faults: list[str]
) -> LossHead:
    """The head at ``slot`` (see ``n_wise``); a stage too short for one is added to ``faults``."""
    if slot == len(bounds) - 1:
        return _final_head(bounds)
    if fraction == 0:
        return LossHead(slot - 1, bounds[slot], weight)
    num_layers = bounds[slot + 1] - bounds[slot]
    if num_layers < 2:
        faults.append(
            f"a fractional window needs a head within stage {slot}, which has {num_layers} layer; give it at "
            "least 2 layers, or use a whole window"
        )
    inside = min(max(round(fraction * num_layers), 1), num_layers - 1)
    return LossHead(slot, bounds[slot] + inside, weight)


def _faults(plan: GradientFlowPlan) -> list[str]:
    """Everything that is wrong with ``plan``, empty if nothing is."""
    bounds, num = plan.stage_bounds, plan.num_stages
    faults: list[str] = []
    if not plan.heads:
        return ["heads is empty: the last head must be the final loss"]
    for loss, head in enumerate(plan.heads):
        where = f"head {loss} (stage {head.stage}, after layer {head.after_layer})"
        if not 0 <= head.stage < num:
            faults.append(f"{where}: there is no such stage; the plan has {num}")
        elif not bounds[head.stage] < head.after_layer <= bounds[head.stage + 1]:
            first, last = bounds[head.stage] + 1, bounds[head.stage + 1]
            faults.append(f"{where}: stage {head.stage} ends layers {first} to {last}")
        if not head.weight > 0:
            faults.append(f"{where}: its weight is {head.weight}, expected a positive number")
    if plan.heads[-1].after_layer != plan.num_layers:
        faults.append(f"the last head must be the final loss, after layer {plan.num_layers}")
    positions = [head.after_layer for head in plan.heads]
    if not rises(positions):
        faults.append(f"heads must be in the order of their layers, one a layer, not {positions}")
    if len(plan.trained_by) != num:
        faults.append(f"trained_by has {len(plan.trained_by)} entries for {num} stages")
    for stage, losses in enumerate(plan.trained_by[:num]):
        if not losses:
            faults.append(f"stage {stage} is trained by no loss")
        for loss in sorted(losses):
            if not 0 <= loss < len(plan.heads):
                faults.append(f"stage {stage} is trained by loss {loss}: there are {len(plan.heads)}")
            elif plan.heads[loss].after_layer < bounds[stage + 1]:
                faults.append(f"stage {stage} is trained by loss {loss}, which sits before its end")
    trains = frozenset().union(*plan.trained_by)
    unused = [loss for loss in range(len(plan.heads)) if loss not in trains]
    if unused:
        faults.append(f"losses {unused} train no stage: leave their heads out")
    return faults


def rises(numbers: Sequence[int]) -> bool:
    """True if each number is larger than the one before it."""
    return all(a < b for a, b in pairwise(numbers))
