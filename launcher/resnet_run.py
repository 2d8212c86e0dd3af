"""Training, evaluation and checkpoints of ``train_resnet.py``."""

import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job import errors_told_to_all, is_due, stage_losses, write_json
from torch import Tensor
from tqdm import tqdm

from ds_interlock import InterlockConfig
from ds_interlock.images.batches import (
    ImageIterator,
    MicroBatch,
    evaluation_batches,
    num_evaluation_batches,
)
from ds_interlock.images.data import ImageData, Normalisation, Score


class Run:
    """One engine and its data, which only the ranks of stage 0 read.

    Args:
        engine: What ``ds_interlock.initialize`` made.
        args: The command line.
        data: The images.
    """

    def __init__(self, engine: Any, args: Namespace, data: ImageData) -> None:
        self.engine = engine
        self.args = args
        self.checkpoints = Path(args.output_dir) / "checkpoints"
        self.num_classes = data.num_classes
        self.num_train_images = len(data.train)
        self.micro_batch_size: int = engine.train_micro_batch_size_per_gpu()
        self.num_replicas: int = engine.grid.get_data_parallel_world_size()
        self.images_per_batch: int = (
            self.micro_batch_size * self.num_replicas * engine.gradient_accumulation_steps()
        )
        self.num_test_batches = num_evaluation_batches(
            len(data.test), self.micro_batch_size, self.num_replicas
        )
        self.step = 0
        self.saved_step: int | None = None
        self.seconds = 0.0
        self.trained_images = 0
        self.reads = engine.is_first_stage()
        with errors_told_to_all():
            if self.reads:
                self._open(data)

    def train(self) -> None:
        """Trains up to ``--max_steps``, with evaluations and checkpoints on the way."""
        args = self.args
        bar = tqdm(total=args.max_steps, initial=self.step, unit="step", disable=dist.get_rank() != 0)
        with bar:
            while self.step < args.max_steps:
                is_last = self.step + 1 == args.max_steps
                if is_last:
                    self.engine.record_timeline()
                loss = self._train_step()
                bar.update()
                if self.step % args.logging_steps == 0 and not bar.disable:
                    speed = f"{self.trained_images / self.seconds:.0f}"
                    bar.set_postfix({"loss": f"{loss:.3f}", "images/s": speed, **stage_losses(self.engine)})
                if is_due(self.step, args.eval_steps) and not is_last:
                    score = self.evaluate()
                    if not bar.disable:
                        bar.write(f"step {self.step}: {_described(score)}")
                if is_due(self.step, args.save_steps):
                    self.save()

    def evaluate(self) -> Score:
        """The model on all test images, counted exactly; the same on every rank."""
        self._average_statistics()
        labels: list[Tensor] = []
        outputs = self.engine.eval_batch(
            self._test_batches(labels),
            compute_loss=False,
            num_micro_batches=self.num_test_batches,
        )
        logits = self._to_all_stages(outputs)
        score = Score.of(logits, torch.cat(labels)) if self.reads else Score()
        total = torch.tensor([score.num_images, score.num_errors, score.loss_sum], dtype=torch.float64)
        total = total.to(self.engine.device)
        dist.all_reduce(total)  # each image was scored by one rank
        num_images, num_errors, loss_sum = total.tolist()
        return Score(int(num_images), int(num_errors), loss_sum)

    def save(self) -> None:
        """Writes a checkpoint. It holds all that a resumed run needs, its position in the data, too."""
        self._average_statistics()
        self.engine.save_checkpoint(self.checkpoints, tag=f"global_step{self.step}")
        self.saved_step = self.step

    def finish(self, interlock: InterlockConfig) -> None:
        """Ends the training: last loss, timeline, evaluation, checkpoint, and ``metrics.json``."""
        output_dir = Path(self.args.output_dir)
        started = time.perf_counter()
        train_loss = self.engine.drain().item()
        self.seconds += time.perf_counter() - started
        if self.trained_images:
            self.engine.write_timeline(output_dir / "timeline.svg")
        score = self.evaluate()
        if self.saved_step != self.step:
            self.save()
        if dist.get_rank() == 0:
            metrics = self._metrics(interlock, train_loss, score)
            write_json(output_dir / "metrics.json", metrics)
            window = f", window {interlock.window:g}" if interlock.window else ""
            print(f"mode {interlock.mode_name}{window}, {self.step} steps: {_described(score)}")

    def _metrics(self, interlock: InterlockConfig, train_loss: float, score: Score) -> dict[str, Any]:
        return {
            "train_loss": train_loss,
            "test_error": score.error,
            "test_loss": score.loss,
            "num_test_images": score.num_images,
            "num_test_errors": score.num_errors,
            "images_per_second": self.trained_images / self.seconds if self.trained_images else None,
            "mode": interlock.mode_name,
            "window": interlock.window,
            "num_stages": self.args.num_stages,
            "depth": self.args.depth,
            "seed": self.args.seed,
            "steps": self.step,
            "epochs": self.step * self.images_per_batch / self.num_train_images,
            "seconds": self.seconds,
        }

    def _open(self, data: ImageData) -> None:
        """Puts the images where micro-batches are wanted, and gives the training images to the engine."""
        self.normalisation = Normalisation.of(data.train)
        self.test = data.test.to(self.engine.device)
        train = ImageIterator(
            data.train.to(self.engine.device),
            self.normalisation,
            self.micro_batch_size,
            replica=self.engine.grid.get_data_parallel_rank(),
            num_replicas=self.num_replicas,
            seed=self.args.seed,
            augment=not self.args.no_augment,
        )
        self.engine.set_dataiterator(train)  # its position is saved and restored with the engine

    def _train_step(self) -> float:
        started = time.perf_counter()
        loss: float = self.engine.train_batch().item()
        self.seconds += time.perf_counter() - started
        self.trained_images += self.images_per_batch
        self.step += 1
        return loss

    def _test_batches(self, labels: list[Tensor]) -> Iterator[MicroBatch]:
        """The test images of this replica on stage 0; the labels of what was read go to ``labels``."""
        if not self.reads:
            return
        batches = evaluation_batches(
            self.test,
            self.normalisation,
            self.micro_batch_size,
            replica=self.engine.grid.get_data_parallel_rank(),
            num_replicas=self.num_replicas,
        )
        for images, labels_b in batches:
            labels.append(labels_b)
            yield images, labels_b

    def _to_all_stages(self, outputs: list[Tensor] | None) -> Tensor:
        """The last stage's outputs, float32 ``[images, classes]``, on every stage of its pipeline."""
        grid, device = self.engine.grid, self.engine.device
        if outputs is None:
            num_images = self.num_test_batches * self.micro_batch_size
            logits = torch.empty(num_images, self.num_classes, device=device)
        else:
            logits = torch.cat(outputs).float()
        last = grid.stage_to_global(stage_id=self.args.num_stages - 1)
        dist.broadcast(logits, src=last, group=grid.get_pipe_parallel_group())
        return logits

    def _average_statistics(self) -> None:
        """Batch norm's running statistics become the mean over the replicas, which each had their own.

        Evaluation then does not depend on which replica an image falls to, and a checkpoint, written by
        one replica, holds for all.
        """
        if self.num_replicas == 1:
            return
        for buffer in self.engine.module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer, group=self.engine.grid.get_data_parallel_group())
                buffer /= self.num_replicas


def _described(score: Score) -> str:
    return f"test error {100 * score.error:.2f} %, test loss {score.loss:.4f}"
