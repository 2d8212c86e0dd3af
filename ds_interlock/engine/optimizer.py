"""What DeepSpeed's optimizers need where a stage clips and steps on its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor

from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.transport.ranks import StageRanks


@dataclass
class StageOptimizer:
    """Gradient norms, clipping, and backward passes that the optimizer does not start itself."""

    engine: DeepSpeedSide
    ranks: StageRanks
    immediate_bf16: bool
    """Whether DeepSpeed's bf16 optimizer takes gradients up in hooks of its own."""
    _norm: Tensor | None = None

    def measure_norm(self) -> None:
        """Computes the norm of this stage's gradients, with its tensor-parallel ranks, if it is needed."""
        engine, self._norm = self.engine, None
        if hasattr(engine.optimizer, "_global_grad_norm") or isinstance(engine.optimizer, ZeROOptimizer):
            return  # keeps gradients to itself, and has a norm after the step
        # Tensor-parallel ranks always: they sum, and the monitor may be on on one of them alone.
        if not (engine.monitor.enabled or engine.gradient_clipping() > 0 or self.ranks.num_slices > 1):
            return
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self.ranks.num_slices > 1:
            squared = self._norm.square()
            self.ranks.sum_over_slices(squared)
            self._norm = squared.sqrt()

    def clip(self) -> None:
        """Clips by the norm that was measured."""
        assert self._norm is not None
        parameters = list(self.engine.module.parameters())
        torch.nn.utils.clip_grads_with_norm_(parameters, self.engine.gradient_clipping(), self._norm)

    def norm_of_step(self) -> float | Tensor | None:
        """The gradient norm of the step just taken; None if it is not known."""
        optimizer: Any = self.engine.optimizer
        return getattr(optimizer, "_global_grad_norm", None) if self._norm is None else self._norm

    def enter_phase(self) -> None:
        """Gives ZeRO, which asks only once, the ranks over which norms are to be taken from now on."""
        if hasattr(self.engine.optimizer, "model_parallel_group"):
            self.engine.optimizer.model_parallel_group = self.engine.mpu.get_model_parallel_group()

    @contextmanager
    def weight_pass(self) -> Iterator[None]:
        """What DeepSpeed's bf16 and ZeRO optimizers need around a pass that they do not start."""
        optimizer, bf16 = self.engine.optimizer, self.engine.using_bf16_optimizer
        zero = isinstance(optimizer, ZeROOptimizer) and not bf16
        if bf16:
            optimizer.clear_lp_grads()
        elif zero:
            optimizer.enter_backward()
        yield
        if bf16 and not self.immediate_bf16:
            optimizer.update_hp_grads(clear_lp_grads=False)
        elif zero:
            optimizer.backward_epilogue()
            optimizer.exit_backward()

    def exercise_placeholder(self) -> None:
        """Gives the parameter of a frozen stage a gradient of 0: without any, no norm can be taken."""
        placeholder = self.engine.module.placeholder
        if placeholder is not None:
            with self.weight_pass():
                (0 * placeholder).sum().backward()  # type: ignore[no-untyped-call]
