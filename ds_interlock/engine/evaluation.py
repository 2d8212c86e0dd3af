"""``eval_batch``: the losses of a batch, the final one or every head's, without gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class EvaluationMixin:
    """``eval_batch`` of the engine."""

    _outputs: list[Any] | None
    """While outputs are wanted: those of the micro-batches so far, on the last stage."""

    def eval_batch(
        self: Any,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
        return_head_losses: bool = False,
    ) -> Any:
        """Evaluates one batch, as DeepSpeed's ``eval_batch``. All ranks must call it.

        Args:
            data_iter: Iterator over ``(inputs, labels)``. Only stage 0 reads it.
            return_logits: Also return the outputs of the last micro-batch (None but on the last stage).
            compute_loss: If false, return the model's outputs, a list over micro-batches, on the last
                stage, and None elsewhere.
            reduce_output: ``"avg"``, the mean over micro-batches and replicas; DeepSpeed has no other.
            bcast_loss: Accepted for compatibility; every rank gets the loss.
            num_micro_batches: Micro-batches to read; by default as many as in training.
            return_head_losses: Also return every head's loss, by name (see ``loss_name``).

        Returns:
            The final loss, a float32 scalar, the same on every rank; with ``return_logits`` or
            ``return_head_losses`` a tuple with those after it.
        """
        if compute_loss and reduce_output != "avg":
            raise NotImplementedError(f'reduce_output={reduce_output!r}: losses can only be averaged, "avg"')
        self.module.eval()
        training_data, self.data_iterator = self.data_iterator, data_iter
        self._outputs = [] if return_logits or not compute_loss else None
        try:
            with torch.no_grad():
                self._run(
                    self._evaluation_schedule(num_micro_batches or self.micro_batches, return_head_losses)
                )
        finally:
            self.data_iterator = training_data
            outputs, self._outputs = self._outputs, None
        self.module.train()
        if not compute_loss:
            return outputs if self.is_last_stage() else None
        losses = self._losses_of_all_stages()
        loss = losses[self.plan.final]
        if self.global_rank == 0 and self.monitor.enabled:
            self.monitor.write_events([("Train/Samples/eval_loss", loss.item(), self.global_samples)])
        result: list[Any] = [loss]
        if return_logits:
            result.append(outputs[-1] if outputs else None)
        if return_head_losses:
            result.append({self.loss_name(index): value.item() for index, value in enumerate(losses)})
        return result[0] if len(result) == 1 else tuple(result)

    def _losses_of_all_stages(self: Any) -> Tensor:
        """Every head's mean loss in the batch just evaluated, in the plan's order, on all ranks."""
        own = self._average_over_replicas(self._work.mean_losses())
        losses = torch.zeros(len(self.plan.heads), device=self.device)
        for loss, value in own.items():
            losses[loss] = value
        if self.is_pipe_parallel:
            dist.all_reduce(losses, group=self.grid.get_pipe_parallel_group())
        return losses
