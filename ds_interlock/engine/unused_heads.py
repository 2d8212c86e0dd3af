"""Heads that the present phase of a schedule does not use: nothing about them changes.

No loss gives them gradients, but two things would still move them:

    DeepSpeed, in float32      gives a parameter without a gradient one of zeros    ─► taken away again
    its bf16 and ZeRO          step flat copies of whole parameter groups           ─► a group for the heads
    optimizers                                                                         of the same phases; no
                                                                                       gradient, no step
"""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor, nn

from ds_interlock.engine.module import InterlockPipelineModule
from ds_interlock.errors import ConfigError

UNUSED_PHASES = "idle_phases"
"""Key of a parameter group of the optimizer, also in checkpoints: the phases that do not use it."""


class UnusedHeads:
    """Keeps unused heads as they are: makes DeepSpeed's or torch's optimizer skip their groups."""

    def __init__(self, module: InterlockPipelineModule, optimizer: Any, device: torch.device) -> None:
        self._module = module
        self._device = device
        if optimizer is None or not has_unused_heads(module):
            return
        inner = optimizer.optimizer if isinstance(optimizer, ZeROOptimizer) else optimizer
        inner.register_step_pre_hook(self._drop_gradients_of_groups)
        if hasattr(optimizer, "get_grad_norm_direct"):
            self._leave_out_of_the_norm(optimizer)

    def drop_gradients(self) -> None:
        """Takes away the gradients of zero that DeepSpeed gives them."""
        for number, head in self._module.heads.items():
            if self._module.schedule.is_idle(int(number), self._module.phase):
                head.zero_grad()

    def _is_unused(self, group: dict[str, Any]) -> bool:
        return self._module.phase in group.get(UNUSED_PHASES, ())

    def _drop_gradients_of_groups(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in filter(self._is_unused, optimizer.param_groups):
            for parameter in group["params"]:
                parameter.grad = None

    def _leave_out_of_the_norm(self, zero: Any) -> None:
        """ZeRO's norm has one collective per group; over the pipe all stages must have equally many."""
        norm_of = zero.get_grad_norm_direct

        def norm(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter], norm_type: int = 2) -> Any:
            for number, group in enumerate(zero.optimizer.param_groups):
                if parameters is zero.params_in_partition[number] and self._is_unused(group):
                    return torch.zeros((), device=self._device)
            return norm_of(gradients, parameters, norm_type)

        zero.get_grad_norm_direct = norm


def check_unused_heads(module: InterlockPipelineModule, optimizer: Any, *, own: bool, zero: bool) -> None:
    """Refuses on every rank what would change unused heads: an optimizer of the user's ``own``, ``zero``."""
    if not has_unused_heads(module):
        return
    if own and isinstance(optimizer, ZeROOptimizer):
        raise ConfigError(
            "interlock.schedule: some phases do not use all heads; with bf16 or ZeRO this needs the "
            "optimizer of the JSON config: leave out optimizer and model_parameters"
        )
    if module.keeps_ties and zero:
        raise ConfigError(
            'interlock.tied_weights: "sync" cannot be combined with ZeRO and a schedule whose phases use '
            'different heads; use "untie", or zero_optimization.stage 0'
        )


def has_unused_heads(module: InterlockPipelineModule) -> bool:
    """Whether any head of any stage is unused in some phase: the same on all ranks."""
    return any(module.unused_phases(head) for head in range(len(module.schedule.heads)))
