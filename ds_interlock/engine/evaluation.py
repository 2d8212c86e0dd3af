"""The losses of a batch, the final one or every head's, without gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.engine.runner import StageRunner
from ds_interlock.stage.hidden import Hidden
from ds_interlock.transport.ranks import StageRanks


class Evaluation:
    """Evaluates batches on data of their own. All ranks must call its methods."""

    def __init__(self, engine: DeepSpeedSide, ranks: StageRanks, runner: StageRunner) -> None:
        self._engine = engine
        self._ranks = ranks
        self._runner = runner

    def outputs(
        self, data_iter: Iterator[Any], num_micro_batches: int, *, all_heads: bool, keep_outputs: bool
    ) -> list[Hidden]:
        """Runs a batch; returns the outputs of its micro-batches, on the last stage if they are kept."""
        engine, runner = self._engine, self._runner
        outputs: list[Hidden] = []
        engine.module.eval()
        training_data, engine.data_iterator = engine.data_iterator, data_iter
        if keep_outputs and self._ranks.is_last_stage:
            runner.interpreter.outputs = outputs
        try:
            with torch.no_grad():
                runner.run(runner.evaluation_schedule(num_micro_batches, all_heads=all_heads))
        finally:
            engine.data_iterator = training_data
            runner.interpreter.outputs = None
        engine.module.train()
        return outputs

    def losses(self) -> Tensor:
        """Every head's mean loss in the batch just evaluated, in the plan's order, on all ranks.

        The final one goes to DeepSpeed's monitor.
        """
        own = self._ranks.average_over_replicas(self._runner.work.mean_losses())
        losses = torch.zeros(len(self._runner.work.plan.heads), device=self._ranks.device)
        for loss, value in own.items():
            losses[loss] = value
        self._ranks.sum_over_pipeline(losses)
        engine = self._engine
        if self._ranks.global_rank == 0 and engine.monitor.enabled:
            final = losses[engine.module.plan.final].item()
            engine.monitor.write_events([("Train/Samples/eval_loss", final, engine.global_samples)])
        return losses
