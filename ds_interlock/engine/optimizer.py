"""What DeepSpeed's optimizers must be told when a stage clips and steps on its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from torch import Tensor
from torch import distributed as dist


class OptimizerMixin:
    """Gradient norms, clipping, and backward passes that the optimizer does not start itself."""

    def clip_fp32_gradients(self: Any) -> None:
        """Clips by the norm of this stage's gradients, or of the whole model's if stages step together.

        They do under global, and with weights kept tied: both copies must take the same step.
        """
        if not self.module.steps_alone:
            super().clip_fp32_gradients()  # type: ignore[misc]
            return
        assert isinstance(self._gradient_norm, Tensor)
        parameters = list(self.module.parameters())
        torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clipping(), self._gradient_norm)

    def _stage_gradient_norm(self: Any) -> Tensor | None:
        """The norm of this stage's gradients, its tensor-parallel ranks' included.

        None if nobody needs it, or if the optimizer keeps gradients to itself and tells the norm
        after the step.
        """
        if hasattr(self.optimizer, "_global_grad_norm") or isinstance(self.optimizer, ZeROOptimizer):
            return None
        if not (self.monitor.enabled or self.gradient_clipping() > 0):
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.is_model_parallel:
            squared = norm.square()
            dist.all_reduce(squared, group=self.grid.get_slice_parallel_group())
            norm = squared.sqrt()
        return norm

    def _norm_over_what_steps_together(self: Any) -> None:
        """Tells ZeRO, which asks only once, over which ranks norms are to be taken from now on."""
        if hasattr(self.optimizer, "model_parallel_group"):
            self.optimizer.model_parallel_group = self.mpu.get_model_parallel_group()

    def _reduce_non_expert_gradients(self: Any, grads: list[Tensor], elements_per_buffer: int) -> None:
        """DeepSpeed's all-reduce over the replicas, unless this stage has only one and nothing would change.

        It would copy every gradient into a buffer and back. What it would change is the rounding, if
        gradients are to travel in another type or to be divided on the way.
        """
        alone = not self.is_data_parallel and self.gradient_predivide_factor() == 1.0
        rounds = any(getattr(g, "dtype", None) != self.communication_data_type for g in grads)
        if rounds or not alone:
            super()._reduce_non_expert_gradients(grads, elements_per_buffer)  # type: ignore[misc]

    @contextmanager
    def _backward_passes(self: Any) -> Iterator[None]:
        """DeepSpeed's hooks take a backward pass that the engine has not announced for the user's own."""
        self._running_engine_backward = True
        try:
            yield
        finally:
            self._running_engine_backward = False

    @contextmanager
    def _weight_pass(self: Any) -> Iterator[None]:
        """What DeepSpeed's bf16 and ZeRO optimizers need to know about a pass that they do not start."""
        bf16 = self.using_bf16_optimizer
        zero = isinstance(self.optimizer, ZeROOptimizer) and not bf16
        if bf16:
            self.optimizer.clear_lp_grads()
        elif zero:
            self.optimizer.enter_backward()
        yield
        if bf16 and not self._config.bfloat16_config.immediate_grad_update:
            self.optimizer.update_hp_grads(clear_lp_grads=False)
        elif zero:
            self.optimizer.backward_epilogue()
            self.optimizer.exit_backward()

    def _exercise_placeholder(self: Any) -> None:
        """Gives the parameter of a frozen stage a gradient of 0: without any, no norm can be taken."""
        if self.module.placeholder is not None:
            with self._weight_pass():
                (0 * self.module.placeholder).sum().backward()
