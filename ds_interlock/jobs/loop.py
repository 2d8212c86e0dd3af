"""The training loop of all jobs: steps, logs, evaluations, checkpoints, resumption, timeline, results."""

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist

from ds_interlock.checkpoints.folder import newest_complete, remove_oldest
from ds_interlock.hf.data.batches import BatchShape
from ds_interlock.jobs import process
from ds_interlock.jobs.arguments import RunArguments
from ds_interlock.jobs.process import Job, Result, broadcast_from_rank_0, propagate_errors, writing
from ds_interlock.jobs.reports import Progress, TrainLog, write_metrics

Metrics = dict[str, Any]  # the contents of ``metrics.json``: numbers by name, and the mode
Losses = dict[str, float]  # results of an evaluation by name

_BEST = "best"
_NUMBERED = "global_step"
_TIMELINE_STEPS = 20  # the timeline shows a typical one of the last


@dataclass(frozen=True)
class Trained:
    """What the loop knows at its end."""

    step: int  # from the beginning, steps before a resumption included
    units_per_second: float  # without evaluations and checkpoints; 0 if nothing was trained
    checkpoint: Path  # the last one
    best_checkpoint: Path  # the one with the lowest loss, if the task keeps it
    first: Losses  # before the first step; empty if the task does not evaluate then
    last: Losses
    best: Losses  # of the best checkpoint, and its "step"; empty if there is none


class Task(ABC):
    """What one job trains on, evaluates and exports. Only the ranks of stage 0 have data."""

    loss_name: ClassVar[str]  # among the results of an evaluation
    unit: ClassVar[str | None] = None  # what the speed counts, such as "tokens"; None to show no speed
    units_per_sample: int = 1
    evaluates_first: bool = False  # before the first step
    keeps_best: ClassVar[bool] = False  # the checkpoint with the lowest loss, if evaluated on the way
    patience: int | None = None  # stops after so many evaluations in a row without a lower loss

    def __init__(self, engine: Any, output_dir: str) -> None:
        self.engine = engine
        self.output = Path(output_dir)
        self.replica: int = engine.grid.get_data_parallel_rank()
        self.shape = BatchShape(
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
            engine.grid.get_data_parallel_world_size(),
        )
        self.share = {"replica": self.replica, "num_replicas": self.shape.num_replicas}

    def begin(self, step: int) -> None:  # noqa: B027 - most have nothing to do
        """Called on all ranks when the run is at ``step``, before anything is evaluated or trained."""

    def before_checkpoint(self) -> None:  # noqa: B027 - most have nothing to do
        """Called on all ranks before a checkpoint is written."""

    def from_last_stage(self, value: Result) -> Result:
        """The ``value`` that the last stage of this rank's pipeline gives. All ranks must call it."""
        own = (self.replica, value) if self.engine.is_last_stage() else None
        return dict(filter(None, process.gather(own)))[self.replica]

    @abstractmethod
    def evaluate(self) -> Losses:
        """Results on the validation data, the same on every rank. All ranks must call it."""

    @abstractmethod
    def describe(self, losses: Losses) -> str:
        """A few words on the results of an evaluation."""

    @abstractmethod
    def export(self, trained: Trained) -> Metrics:
        """On rank 0: writes what the job is for; returns the task's own metrics."""

    @abstractmethod
    def summary(self, metrics: Metrics) -> str:
        """On rank 0: what the user reads at the end."""


class Loop:
    """One run of ``task``."""

    def __init__(self, task: Task, args: RunArguments, job: Job) -> None:
        self.task, self.args, self.job = task, args, job
        self.engine, self.output = task.engine, task.output
        self.checkpoints = self.output / "checkpoints"
        self.log = TrainLog(self.output / "train_log.jsonl")
        self.is_rank_0 = dist.get_rank() == 0
        self.step = self.first_step = 0
        self.seconds = 0.0
        self.saved_step: int | None = None
        self.records = False  # a timeline
        self.best: Losses = {}  # the best evaluation, and its "step"
        self.num_worse = 0  # evaluations since the best
        self.last_evaluation: tuple[int, Losses] | None = None

    def run(self) -> Metrics:
        """Trains up to ``max_steps`` and destroys the engine; returns the metrics. All ranks must call it."""
        path = self._checkpoint_to_resume()
        if path is not None:
            self.step = self.first_step = process.resume(self.engine, path)
        self.task.begin(self.step)
        self.progress = Progress(self.step, self.args.max_steps, shows=self.is_rank_0)
        first = self._begin_log()
        self._train()
        metrics = self._finish(first)
        self.engine.destroy()
        return metrics

    def _checkpoint_to_resume(self) -> Path | None:
        name = self.args.resume_from_checkpoint
        if name != "auto":
            return Path(name) if name else None
        path = broadcast_from_rank_0(newest_complete(self.checkpoints, _NUMBERED) if self.is_rank_0 else None)
        if self.is_rank_0:
            print(f"resuming {path}" if path else f"no checkpoint in {self.checkpoints} yet", flush=True)
        return path

    def _begin_log(self) -> Losses:
        """Results of the evaluation before the first step; a resumed run has them in its log."""
        past: dict[int, Losses] = {}
        with propagate_errors(), writing(self.output):
            if self.is_rank_0:
                past = self.log.evaluations(self.task.loss_name) if self.step > 0 else {}
                self.log.begin(self.step)
                if (self.checkpoints / _BEST).is_dir():
                    losses = {step: past[step][self.task.loss_name] for step in sorted(past) if step}
                    self.best = dict(past[min(losses, key=losses.__getitem__)]) if losses else {}
                    before = [loss for step, loss in losses.items() if step <= self.step]
                    self.num_worse = before[::-1].index(min(before)) if before else 0
        state = past.get(0, {}), self.best, self.num_worse
        first, self.best, self.num_worse = broadcast_from_rank_0(state)
        if not first and self.task.evaluates_first:
            first = self.task.evaluate()
            self._log_evaluation(first)
        return {name: loss for name, loss in first.items() if name != "step"}

    def _train(self) -> None:
        args = self.args
        # Evaluations would be part of the timeline, so it begins after the last one on the way.
        last_evaluation = (args.max_steps - 1) // args.eval_steps * args.eval_steps if args.eval_steps else 0
        timeline_from = max(self.first_step, last_evaluation, args.max_steps - _TIMELINE_STEPS)
        while self.step < args.max_steps and not self._is_out_of_patience():
            if self.step == timeline_from:
                self.engine.record_timeline()
                self.records = True
            started = time.perf_counter()
            loss = self.engine.train_batch().item()
            self.seconds += time.perf_counter() - started
            self.step += 1
            self.progress.bar.update()
            if _is_due(self.step, args.logging_steps):
                self._log_training(loss)
            if _is_due(self.step, args.eval_steps) and self.step < args.max_steps:
                self._log_evaluation(self._evaluate())
            if _is_due(self.step, args.save_steps):
                self._save(f"{_NUMBERED}{self.step}")
        self.progress.bar.close()

    def _is_out_of_patience(self) -> bool:
        if self.task.patience is None or self.num_worse < self.task.patience:
            return False
        why = f"no lower {self.task.loss_name} in {self.num_worse} evaluations"
        self.progress.write(f"step {self.step}: stopped early, {why}")
        return True

    def _evaluate(self) -> Losses:
        """Evaluates; if the task keeps the best checkpoint, saves one that is better than all before."""
        losses = self.task.evaluate()
        self.last_evaluation = self.step, losses
        if self.task.keeps_best and self.args.eval_steps:
            self.num_worse += 1
            if losses[self.task.loss_name] < self.best.get(self.task.loss_name, math.inf):
                self.best, self.num_worse = {"step": self.step, **losses}, 0
                self._save(_BEST)
        return losses

    def _save(self, tag: str) -> None:
        """Writes a checkpoint. It holds all that a resumed run needs, its position in the data, too."""
        self.task.before_checkpoint()
        with writing(self.checkpoints):
            self.engine.save_checkpoint(self.checkpoints, tag=tag, save_latest=tag != _BEST)
        if tag != _BEST:
            self.saved_step = self.step
        if self.args.save_total_limit and process.local_rank() == 0:  # of each machine: disks may be local
            remove_oldest(self.checkpoints, _NUMBERED, self.args.save_total_limit)

    def _finish(self, first: Losses) -> Metrics:
        started = time.perf_counter()
        train_loss = self.engine.drain().item()
        self.seconds += time.perf_counter() - started
        if self.records:
            self.engine.write_timeline(self.output / "timeline.svg")
        is_evaluated = self.last_evaluation is not None and self.last_evaluation[0] == self.step
        last = self.last_evaluation[1] if is_evaluated and self.last_evaluation else self._evaluate()
        tag = f"{_NUMBERED}{self.step}"
        if self.saved_step != self.step:
            self._save(tag)
        self.engine.drain()  # the checkpoint is complete
        if not is_evaluated:
            self._log_evaluation(last)
        metrics: Metrics = {
            "mode": self.job.interlock.mode_name,
            "window": self.job.interlock.window,
            "num_stages": self.job.num_stages,
            "seed": self.args.seed,
            "steps": self.step,
            "seconds": self.seconds,
            "peak_memory_bytes": process.peak_memory_bytes(),
            "train_loss": train_loss,
        }
        if self.task.keeps_best and self.args.eval_steps:
            metrics[f"best_{self.task.loss_name}"] = self.best.get(self.task.loss_name, math.inf)
        speed, best = self._units_per_second(), self.checkpoints / _BEST
        trained = Trained(self.step, speed, self.checkpoints / tag, best, first, last, self.best)
        with propagate_errors(), writing(self.output):
            if self.is_rank_0:
                metrics |= self.task.export(trained)
                write_metrics(self.output / "metrics.json", metrics)
                rate = f", {speed:.0f} {self.task.unit}/s" if self.task.unit else ""
                run = f"{self.job.num_stages} stages, {self.step} steps, {self.seconds:.0f} s{rate}"
                print(f"{self.job.mode}: {run}\n{self.task.summary(metrics)}", flush=True)
        return broadcast_from_rank_0(metrics)

    def _units_per_second(self) -> float:
        num_samples = (self.step - self.first_step) * self.task.shape.num_rows
        return num_samples * self.task.units_per_sample / self.seconds

    def _log_training(self, loss: float) -> None:
        if not self.is_rank_0:
            return
        values = {"loss": f"{loss:.3f}"}
        if self.task.unit:
            values[f"{self.task.unit}/s"] = f"{self._units_per_second():.0f}"
        losses = self.engine.stage_losses()  # by names such as "stage_1/loss_after_layer_6"
        of_heads = {name: loss for name, loss in losses.items() if not name.endswith("/final_loss")}
        values |= {name.partition("/")[0]: f"{loss:.3f}" for name, loss in of_heads.items()}
        self.progress.report(self.step, values)
        entry = {"learning_rate": self.engine.get_lr()[0], "seconds": self.seconds, **losses}
        self.log.append({"step": self.step, "loss": loss, **entry})

    def _log_evaluation(self, losses: Losses) -> None:
        if not self.is_rank_0:
            return
        self.progress.write(f"step {self.step}: {self.task.describe(losses)}")
        self.log.append({"step": self.step, **losses})
        if self.engine.monitor.enabled:
            samples = self.engine.global_samples
            events = [(f"Eval/{name}", value, samples) for name, value in losses.items()]
            self.engine.monitor.write_events(events)


def perplexity(loss: float) -> float:
    """Of a loss in nats."""
    return math.exp(min(loss, 700.0))  # beyond that it is no number


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
