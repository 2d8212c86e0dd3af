"""Heads that the present phase of a schedule does not use: they rest, and nothing about them changes.

No loss gives them gradients, but two things would still move them:

    DeepSpeed, in float32      gives a parameter without a gradient one of zeros    ─► taken away again
    its bf16 and ZeRO          step flat copies of whole parameter groups           ─► a group for the heads
    optimizers                                                                         that rest together;
                                                                                       no gradient, no step

so that weight decay and momentum leave them alone, as torch's optimizers leave every parameter alone that
has no gradient.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor, nn

from ds_interlock.errors import ConfigError

IDLE_PHASES = "idle_phases"
"""Key of a parameter group of the optimizer: the phases in which it rests."""


class IdleHeadsMixin:
    """What the engine does about them."""

    def _drop_gradients_of_idle_heads(self: Any) -> None:
        for parameter in _idle_parameters(self.module):
            parameter.grad = None

    def _skip_groups_of_idle_heads(self: Any) -> None:
        """Makes the optimizer pass over the groups that rest; to be called once it is there."""
        if self.optimizer is None or not _has_idle_heads(self.module):
            return

        def skip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                if self.module.phase in group.get(IDLE_PHASES, ()):
                    for parameter in group["params"]:
                        parameter.grad = None

        inner = self.optimizer.optimizer if isinstance(self.optimizer, ZeROOptimizer) else self.optimizer
        inner.register_step_pre_hook(skip)
        if hasattr(self.optimizer, "get_grad_norm_direct"):
            self._leave_idle_groups_out_of_the_norm()

    def _leave_idle_groups_out_of_the_norm(self: Any) -> None:
        """ZeRO's norm has a collective a group: over the pipe, stages must have as many as each other."""
        zero = self.optimizer
        norm_of = zero.get_grad_norm_direct

        def norm(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter], norm_type: int = 2) -> Any:
            idle = [
                zero.params_in_partition[number]
                for number, group in enumerate(zero.optimizer.param_groups)
                if self.module.phase in group.get(IDLE_PHASES, ())
            ]
            if any(parameters is those for those in idle):
                return torch.zeros((), device=self.device)
            return norm_of(gradients, parameters, norm_type)

        zero.get_grad_norm_direct = norm


def check_idle_heads(engine: Any, brings_own_parameters: bool) -> None:
    """Refuses what heads cannot rest under.

    Raises:
        ConfigError: On every rank.
    """
    if not _has_idle_heads(engine.module):
        return
    if brings_own_parameters and isinstance(engine.optimizer, ZeROOptimizer):
        raise ConfigError(
            "interlock.schedule: some phases do not use all heads; with bf16 or ZeRO these rest only under "
            "the optimizer of the JSON config: leave out optimizer and model_parameters"
        )
    if engine.module.keeps_ties and engine.zero_optimization():
        raise ConfigError(
            'interlock.tied_weights: "sync" cannot be combined with ZeRO and a schedule whose phases do not '
            'all use the same heads; use "untie", or zero_optimization.stage 0'
        )


def _has_idle_heads(module: Any) -> bool:
    """Whether any head of any stage rests in some phase: the same on all ranks."""
    return any(module.idle_phases(head) for head in range(len(module.schedule.heads)))


def _idle_parameters(module: Any) -> Iterator[nn.Parameter]:
    for number, head in module.heads.items():
        if module.schedule.is_idle(int(number), module.phase):
            yield from head.parameters()
