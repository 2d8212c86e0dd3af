"""The auxiliary heads of a model or of a stage, found by their position."""

from collections.abc import Callable

from torch import nn

from ds_interlock.errors import ConfigError
from ds_interlock.sampling import seeded
from ds_interlock.schedule.plan import GradientFlowPlan, LossHead

MakeHead = Callable[[LossHead], nn.Module]


class Heads(nn.ModuleDict):
    """Auxiliary heads by their number, which is part of the names of their parameters.

    The same position is another loss index in each plan; here alone one is turned into the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, str] = {}

    def add(self, number: int, head: LossHead, module: nn.Module) -> None:
        """Adds the head with this number, at the position of ``head``."""
        self[str(number)] = module
        self._names[head.after_layer] = str(number)

    def has(self, head: LossHead) -> bool:
        """Whether there is a head at this position."""
        return head.after_layer in self._names

    def by_loss(self, plan: GradientFlowPlan, stage: int) -> dict[int, nn.Module]:
        """The auxiliary heads of ``stage`` by their loss index in ``plan``; the final loss has none."""
        losses = [loss for loss in plan.losses_at(stage) if loss != plan.final]
        return {loss: self[self._names[plan.heads[loss].after_layer]] for loss in losses}


def build_head(make_head: MakeHead, number: int, head: LossHead, seed: int = 1234) -> nn.Module:
    """Builds a head from the seed ``seed + number``: the same in any distribution of stages over processes.

    The random state that the layers are drawn from stays unchanged.
    """
    with seeded(seed + number):
        module = make_head(head)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"head({head}) returned {type(module).__name__}: expected a torch.nn.Module")
    return module
