"""The losses of training: posted as reports, and on rank 0 shown once they have arrived."""

from torch import Tensor

from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.engine.ranks import StageRanks
from ds_interlock.engine.reports import COSINE, BatchReport, Reporter
from ds_interlock.schedule.plan import loss_name


class Progress:
    """Reports this stage's batches, and shows what all stages have reported.

    Attributes:
        final_loss: The final loss of the newest batch, on the last stage; None elsewhere.
    """

    def __init__(self, engine: DeepSpeedSide, ranks: StageRanks) -> None:
        self.reporter = Reporter(ranks)
        self.final_loss: Tensor | None = None
        self._engine = engine
        self._ranks = ranks
        self._losses: dict[int, Tensor] = {}
        self._stage_values: dict[int, dict[str, float]] = {}
        self._cosines: dict[int, float] = {}

    def set_losses(self, losses: dict[int, Tensor]) -> None:
        """Takes the mean losses of this stage in the batch, by their index in the plan."""
        self._losses = self._ranks.average_over_replicas(losses)
        self.final_loss = self._losses.get(self._engine.module.plan.final)

    def post(self, batch: int, values: dict[str, float | Tensor | None]) -> None:
        """Reports the losses of the batch, and ``values``."""
        plan = self._engine.module.plan
        names = {loss_name(plan, loss): value for loss, value in self._losses.items()}
        self.reporter.post(BatchReport(batch, {**names, **values}, self.final_loss))

    def stage_losses(self) -> dict[str, float]:
        """Every head's newest loss that has arrived here, by stage and name."""
        return {
            f"stage_{stage}/{name}": value
            for stage, values in sorted(self._stage_values.items())
            for name, value in values.items()
            if "loss" in name
        }

    def gradient_cosines(self) -> dict[str, float]:
        """Every stage's newest cosine that has arrived here."""
        return {f"stage_{stage}": value for stage, value in sorted(self._cosines.items())}

    def write(self) -> None:
        """Writes the reports that have arrived to DeepSpeed's monitor."""
        monitor = self._engine.monitor
        for report in self.reporter.collected():
            samples = int(report.values.pop("samples"))
            self._stage_values[report.stage] = report.values
            if COSINE in report.values:
                self._cosines[report.stage] = report.values[COSINE]
            if not monitor.enabled:
                continue
            names = {f"Train/stage_{report.stage}/{name}": value for name, value in report.values.items()}
            if "final_loss" in report.values:
                names["Train/Samples/train_loss"] = report.values["final_loss"]
            monitor.write_events([(name, value, samples) for name, value in names.items()])

    def print_loss(self, batches_ago: int, loss: Tensor) -> None:
        """Prints the final loss of an earlier batch every ``steps_per_print`` batches."""
        step, every = self._engine.global_steps, self._engine.steps_per_print()
        if self._ranks.global_rank == 0 and every and step % every == 0:
            print(f"steps: {step} loss: {loss.item():0.4f} (of step {step - batches_ago})", flush=True)
