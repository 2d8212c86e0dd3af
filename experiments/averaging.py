"""Averaged weights, so that a run can be judged at every step as if it had been planned to end there.

The learning rate stays constant, and what is evaluated is the average of the weights so far, in which
step s of t has a weight that rises as s**8: about the last ninth of the run, whatever its length. A curve
of such evaluations then says what each budget up to the last would have given, which a curve under a
decaying learning rate does not.

Source: Shamir, Zhang: Stochastic Gradient Descent for Non-smooth Optimization: Convergence Results and
Optimal Averaging Schemes, 2013, section 4 (polynomial-decay averaging).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_ETA = 8


class PolynomialAverage:
    """The average of a module's parameters over the steps so far.

    Batch norm's statistics are of no use with them: ``torch.optim.swa_utils.update_bn`` makes others.
    """

    def __init__(self, module: nn.Module) -> None:
        self._live = list(module.parameters())
        self.tensors = [t.detach().clone() for t in self._live]
        self.num_steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after one more step."""
        self.num_steps += 1
        share = (_ETA + 1) / (self.num_steps + _ETA)
        torch._foreach_lerp_(self.tensors, [t.detach() for t in self._live], share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the module has the average as its weights."""
        kept = [t.detach().clone() for t in self._live]
        self._set(self.tensors)
        try:
            yield
        finally:
            self._set(kept)

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        """What ``load_state_dict`` takes."""
        return {"num_steps": self.num_steps, "tensors": self.tensors}

    def load_state_dict(self, state: dict[str, int | list[Tensor]]) -> None:
        """Goes on where another average of the same module was."""
        tensors, num_steps = state["tensors"], state["num_steps"]
        assert isinstance(tensors, list), "from state_dict"
        assert isinstance(num_steps, int), "from state_dict"
        self.num_steps = num_steps
        torch._foreach_copy_(self.tensors, tensors)

    @torch.no_grad()
    def _set(self, tensors: list[Tensor]) -> None:
        torch._foreach_copy_(self._live, tensors)
