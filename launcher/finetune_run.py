"""Training, evaluation, logs and results of one fine-tuning run."""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from finetune_accuracy import accuracy, predictions
from finetune_data import Data
from finetune_log import TrainLog
from job import errors_told_to_all, is_due, peak_memory_bytes, report, stage_losses, write_json, writing
from tqdm import tqdm

from ds_interlock import InterlockConfig
from ds_interlock.files import unfinished_folder
from ds_interlock.hf.data.batches import BatchShape, EvaluationBatches, TrainingBatches
from ds_interlock.hf.export.description import ModelDescription
from ds_interlock.hf.export.model import export_model
from ds_interlock.hf.model.pretrained import Pretrained

_BEST = "best"


class Run:
    """Training, evaluation and checkpoints of one engine. Only the ranks of stage 0 have data."""

    def __init__(
        self,
        engine: Any,
        args: argparse.Namespace,
        data: Data,
        pretrained: Pretrained,
        description: ModelDescription,
    ) -> None:
        self.engine = engine
        self.args = args
        self.pretrained = pretrained
        self.description = description
        self.output = Path(args.output_dir)
        self.checkpoints = self.output / "checkpoints"
        self.history = TrainLog(self.output / "train_log.jsonl")
        self.is_rank_0 = dist.get_rank() == 0
        self.step = 0
        self.seconds = 0.0
        self.saved_step: int | None = None
        self.first: dict[str, float] = {}
        self.best = math.inf
        shape = BatchShape(
            engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps(),
            engine.grid.get_data_parallel_world_size(),
        )
        replica = engine.grid.get_data_parallel_rank()
        self.training: TrainingBatches | None = None
        self.validation: EvaluationBatches | None = None
        self.num_eval_batches = [0]
        with errors_told_to_all(), writing(self.output):
            if data.train is not None and data.validation is not None:
                self.training = TrainingBatches(data.train, shape, replica=replica, seed=args.seed)
                engine.set_dataiterator(self.training)
                self.validation = EvaluationBatches(data.validation, shape, replica=replica)
                self.num_eval_batches = [self.validation.num_batches]
            if self.is_rank_0:
                self.write_description()
        dist.broadcast_object_list(self.num_eval_batches, src=0)

    def write_description(self) -> None:
        """``checkpoints/hf``: what turns a checkpoint of this run into a Hugging Face model again."""
        with unfinished_folder(self.checkpoints / "hf") as folder:
            self.pretrained.config.save_pretrained(folder)
            self.pretrained.tokenizer.save_pretrained(folder)
            generation = self.pretrained.folder / "generation_config.json"
            if generation.is_file():
                (folder / generation.name).write_bytes(generation.read_bytes())
            self.description.write(folder)

    def train(self) -> None:
        """Trains up to ``--max_steps``, with evaluations and checkpoints on the way."""
        args = self.args
        self.first = self.begin()
        bar = tqdm(total=args.max_steps, initial=self.step, unit="step", disable=not self.is_rank_0)
        with bar:
            while self.step < args.max_steps:
                is_last = self.step + 1 == args.max_steps
                if is_last:
                    self.engine.record_timeline()
                started = time.perf_counter()
                loss = self.engine.train_batch().item()
                self.seconds += time.perf_counter() - started
                self.step += 1
                bar.update()
                if is_due(self.step, args.logging_steps):
                    self.log_training(bar, loss)
                if is_due(self.step, args.eval_steps) and not is_last:
                    self.log(self.evaluate_and_keep_best())
                if is_due(self.step, args.save_steps):
                    self.save()

    def begin(self) -> dict[str, float]:
        """The evaluation before the first step; a resumed run has it, and its best one, in its log."""
        told: list[Any] = [{}, math.inf]
        if self.is_rank_0 and self.step > 0:
            past = self.history.evaluations()
            if (self.checkpoints / _BEST).is_dir():
                told[1] = min((losses["eval_loss"] for at, losses in past.items() if at), default=math.inf)
            told[0] = past.get(0, {})
        if self.is_rank_0:
            self.history.begin(self.step)
        dist.broadcast_object_list(told, src=0)
        first, self.best = told
        if not first:
            first = self.evaluate()
            self.log(first)
        return {name: loss for name, loss in first.items() if name != "step"}

    def evaluate(self) -> dict[str, float]:
        """The losses on the validation data, of all heads, exact means over its labels; on every rank."""
        data: Iterator[Any] | None = None if self.validation is None else iter(self.validation)
        sums: dict[str, float] = {}
        with predictions(self.engine, self.args.task) as predicted:
            for _ in range(self.num_eval_batches[0]):
                _, losses = self.engine.eval_batch(data, return_head_losses=True)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + loss
        means = {
            f"eval_{name.replace('final_loss', 'loss')}": total / self.num_eval_batches[0]
            for name, total in sums.items()
        }
        if self.args.task == "causal":
            means |= {name.replace("loss", "perplexity"): _perplexity(loss) for name, loss in means.items()}
        else:
            means["eval_accuracy"] = accuracy(self.engine, self.validation, predicted)
        return means

    def evaluate_and_keep_best(self) -> dict[str, float]:
        """Evaluates, and saves a checkpoint named ``best`` if there was none as good."""
        losses = self.evaluate()
        if losses["eval_loss"] < self.best:
            self.best = losses["eval_loss"]
            with writing(self.checkpoints):
                self.engine.save_checkpoint(self.checkpoints, tag=_BEST, save_latest=False)
        return losses

    def save(self) -> None:
        """Writes a checkpoint. It holds all that a resumed run needs, its position in the data, too."""
        with writing(self.checkpoints):
            self.engine.save_checkpoint(self.checkpoints, tag=f"global_step{self.step}")
        self.saved_step = self.step

    def finish(self, interlock: InterlockConfig) -> None:
        """Ends the training: last loss, last evaluation, last checkpoint, timeline, export."""
        started = time.perf_counter()
        train_loss = self.engine.drain().item()
        self.seconds += time.perf_counter() - started
        if not math.isnan(train_loss):
            self.engine.write_timeline(self.output / "timeline.svg")
        last = self.evaluate_and_keep_best() if self.args.eval_steps else self.evaluate()
        if self.saved_step != self.step:
            self.save()
        dist.barrier()  # every rank has written its part of the checkpoint
        self.log(last)
        peaks = peak_memory_bytes()
        with errors_told_to_all(), writing(self.output):
            if self.is_rank_0:
                self.write_results(interlock, train_loss, last, peaks)

    def write_results(
        self, interlock: InterlockConfig, train_loss: float, last: dict[str, float], peaks: list[int]
    ) -> None:
        """Exports the model, writes ``metrics.json``, shows what the model writes. On rank 0."""
        args = self.args
        is_best = args.load_best_model_at_end and args.eval_steps
        checkpoint = self.checkpoints / (_BEST if is_best else f"global_step{self.step}")
        is_adapter = bool(args.lora_r) and not (args.merge_adapter or args.task == "classification")
        folder = self.output / ("adapter" if is_adapter else "hf")
        exported = export_model(
            checkpoint,
            folder,
            max_shard_size=args.max_shard_size,
            heads=args.export_heads and not is_adapter,
            merge_adapter=bool(args.lora_r) and not is_adapter,
        )
        metrics = {
            "mode": interlock.mode_name,
            "window": interlock.window,
            "num_stages": args.num_stages,
            "seed": args.seed,
            "steps": self.step,
            "seconds": self.seconds,
            "peak_memory_bytes": peaks,
            "train_loss": train_loss,
            **{f"first_{name}": loss for name, loss in self.first.items()},
            **last,
        }
        write_json(self.output / "metrics.json", metrics)
        before = self.first.get("eval_loss", math.nan)
        print(f"validation loss {before:.4f} before, {last['eval_loss']:.4f} after {self.step} steps")
        print(exported)

    # Logs.

    def log_training(self, bar: Any, loss: float) -> None:
        """The newest training losses, to the bar and to ``train_log.jsonl``."""
        if not self.is_rank_0:
            return
        stages = stage_losses(self.engine)
        bar.set_postfix({"loss": f"{loss:.3f}", **stages})
        rate = self.engine.get_lr()[0]
        entry = {"step": self.step, "loss": loss, "learning_rate": rate, "seconds": self.seconds}
        self.history.append({**entry, **self.engine.stage_losses()})

    def log(self, losses: dict[str, float]) -> None:
        """An evaluation, to the terminal, the monitor and ``train_log.jsonl``."""
        if not self.is_rank_0:
            return
        tqdm.write(report(self.step, losses["eval_loss"], losses.get("eval_accuracy")))
        self.history.append({"step": self.step, **losses})
        if self.engine.monitor.enabled:
            samples = self.engine.global_samples
            self.engine.monitor.write_events(
                [(f"Eval/{name}", value, samples) for name, value in losses.items()]
            )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond that it is no number
