"""What DeepSpeed's optimizers need where a stage clips and steps on its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.errors import NonfiniteError
from ds_interlock.transport.ranks import StageRanks


@dataclass
class StageOptimizer:
    """Gradient norms, clipping, and backward passes that the optimizer does not start itself."""

    engine: DeepSpeedSide
    ranks: StageRanks
    immediate_bf16: bool
    """Whether DeepSpeed's bf16 optimizer takes gradients up in hooks of its own."""
    _norm: Tensor | None = None

    def __post_init__(self) -> None:
        if hasattr(self.engine.optimizer, "check_grad_overflow"):
            self.engine.optimizer.check_grad_overflow = True  # ZeRO's, which leaves it out in float32

    @property
    def skips(self) -> bool:
        """Whether a step with a nan or an infinity is left out, rather than an error."""
        return self.engine.module.interlock.nonfinite == "skip"

    @contextmanager
    def checked(self, losses: Mapping[int, Tensor]) -> Iterator[None]:
        """Around DeepSpeed's step: looks for nan and infinities in this stage's ``losses`` and gradients.

        If the step is to be left out, the gradients go, so that nothing changes, and DeepSpeed counts it. Its
        bf16 and ZeRO optimizers do both themselves.

        Raises:
            NonfiniteError: If there are any, and ``interlock.nonfinite`` is "error".
        """
        engine = self.engine
        self._measure_norm()
        values = [value.float() for value in losses.values()] + ([] if self._norm is None else [self._norm])
        bad = ~torch.stack(values).isfinite().all() if values else torch.zeros((), dtype=torch.bool)
        if not self.skips and bad:
            shown = ", ".join(f"{float(loss):g}" for loss in losses.values()) or "elsewhere"
            self._refuse(f"losses of the batch: {shown}; norm of its gradient: {self._norm}")
        if self.skips and self._norm is not None:
            if not engine.module.steps_alone:
                bad = bad.float()
                self.ranks.sum_over_pipeline(bad)
            engine.optimizer.overflow = bool(bad)
            if bad:
                engine.module.zero_grad()
        yield
        if not self.skips and getattr(engine.optimizer, "overflow", False):
            self._refuse("the gradient of the batch is nan or infinite")

    def _refuse(self, what: str) -> None:
        raise NonfiniteError(
            f'{what}: lower the learning rate, clip gradients, look at the data; interlock.nonfinite "skip" '
            "leaves out such steps"
        )

    def _measure_norm(self) -> None:
        """Computes the norm of the gradients that ``clip`` clips by; not of those that bf16 and ZeRO keep.

        Those of this stage; of the whole model with ``"tied_weights": "sync"``. What tensor-parallel ranks
        or tied layers have copies of counts once.
        """
        engine, self._norm = self.engine, None
        if hasattr(engine.optimizer, "_global_grad_norm") or isinstance(engine.optimizer, ZeROOptimizer):
            return  # keeps gradients to itself, and has a norm after the step
        of_model, of_all_slices = self._clips_together, self.ranks.slice == 0
        gradients = [
            p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            for p in engine.module.parameters()
            if p.grad is not None
            and not (of_model and getattr(p, "ds_pipe_replicated", False))
            and (of_all_slices or is_model_parallel_parameter(p))
        ]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if self.ranks.num_slices > 1 or of_model:
            squared = self._norm.square().to(self.ranks.device)
            self.ranks.sum_over_slices(squared)
            if of_model:
                self.ranks.sum_over_pipeline(squared)
            self._norm = squared.sqrt()

    @property
    def _clips_together(self) -> bool:
        """Whether stages clip by one norm that DeepSpeed does not take: its own is that of stage 0 alone."""
        module = self.engine.module
        return not module.steps_alone and not module.plan.is_end_to_end

    def clip(self, as_deepspeed: Callable[[], None]) -> None:
        """Clips by the norm that was measured; under a global plan ``as_deepspeed``."""
        if getattr(self.engine.optimizer, "overflow", False):
            return  # this step is left out: there are no gradients
        if self.engine.module.plan.is_end_to_end:
            as_deepspeed()
            return
        assert self._norm is not None
        parameters = list(self.engine.module.parameters())
        torch.nn.utils.clip_grads_with_norm_(parameters, self.engine.gradient_clipping(), self._norm)

    def reports(self) -> dict[str, float | Tensor | None]:
        """Of the step just taken: the gradient norm, None if not known; how many were left out so far."""
        optimizer: Any = self.engine.optimizer
        norm = getattr(optimizer, "_global_grad_norm", None) if self._norm is None else self._norm
        return {"gradient_norm": norm, "skipped_steps": self.engine.skipped_steps if self.skips else None}

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
