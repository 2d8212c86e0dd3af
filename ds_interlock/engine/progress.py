"""What has arrived from the stages, to the monitor, to the terminal and to whoever asks. On rank 0."""

from typing import Any

from torch import Tensor

from ds_interlock.engine.myopia import COSINE
from ds_interlock.schedule.plan import loss_name


class ProgressMixin:
    """The reports of the engine, once they are there (``report.py`` is how they travel)."""

    _stage_values: dict[int, dict[str, float]]
    """Of each stage the newest report."""
    _cosines: dict[int, float]
    """Of each stage the newest cosine that was measured."""

    def stage_losses(self: Any) -> dict[str, float]:
        """On rank 0 the newest loss of every head that has arrived there, by name; elsewhere empty."""
        return {
            f"stage_{stage}/{name}": value
            for stage, values in sorted(self._stage_values.items())
            for name, value in values.items()
            if "loss" in name
        }

    def gradient_cosines(self: Any) -> dict[str, float]:
        """On rank 0 the newest result of ``interlock.myopia`` of every stage, by name; elsewhere empty."""
        return {f"stage_{stage}": value for stage, value in sorted(self._cosines.items())}

    def loss_name(self: Any, loss: int) -> str:
        """How the loss with this index in ``plan.heads`` is called in reports."""
        return loss_name(self.plan, loss)

    def _write_reports(self: Any) -> None:
        """On rank 0, hands what has arrived from all stages to DeepSpeed's monitor."""
        for report in self._reporter.collected():
            samples = int(report.values.pop("samples"))
            self._stage_values[report.stage] = report.values
            if COSINE in report.values:
                self._cosines[report.stage] = report.values[COSINE]
            if not self.monitor.enabled:
                continue
            names = {f"Train/stage_{report.stage}/{name}": value for name, value in report.values.items()}
            if "final_loss" in report.values:
                names["Train/Samples/train_loss"] = report.values["final_loss"]
            self.monitor.write_events([(name, value, samples) for name, value in names.items()])

    def _print_progress(self: Any, batch: int, loss: Tensor) -> None:
        every = self.steps_per_print()
        if self.global_rank == 0 and every and self.global_steps % every == 0:
            step = self.global_steps - (self._batches - 1 - batch)
            print(f"steps: {self.global_steps} loss: {loss.item():0.4f} (of step {step})", flush=True)
