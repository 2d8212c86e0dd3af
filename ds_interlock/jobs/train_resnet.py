"""Trains a ResNet on small images, in stages; the DeepSpeed config says in which mode.

    deepspeed --num_gpus 4 launcher/train_resnet.py --deepspeed_config configs/resnet/interlock.json

Without more arguments that is ResNet-20 on Fashion-MNIST (apt-get install dataset-fashion-mnist). It writes
to ``--output_dir``: ``checkpoints/`` to resume from, ``metrics.json`` with the error on the test images,
``train_log.jsonl``, and ``timeline.svg`` with a typical batch. Without this repository's files:
``deepspeed --module ds_interlock.jobs.train_resnet``.

Unless the config has a scheduler, the learning rate is multiplied by 0.1 after half and after three quarters
of the steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import ds_interlock
from ds_interlock import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.images.batches import ImageIterator, MicroBatch, evaluation_batches, num_evaluation_batches
from ds_interlock.images.data import ImageData, Normalisation, Score
from ds_interlock.images.sources import load_images
from ds_interlock.jobs.arguments import RunArguments, argument, config_from
from ds_interlock.jobs.loop import Loop, Losses, Metrics, Task, Trained
from ds_interlock.jobs.process import gather, in_turns, propagate_errors, run_command, start
from ds_interlock.models import resnet


@dataclass(kw_only=True)
class ImageArguments:
    """What it learns from."""

    _argument_group_name: ClassVar[str] = "images"

    dataset: str = argument(
        "fashion-mnist", "fashion-mnist, cifar10, cifar100, or a name for datasets.load_dataset (%(default)s)"
    )
    dataset_config: str | None = argument(None, "name of the data set's configuration")
    data_dir: Path | None = argument(None, "folder of a data set's files (IDX; CIFAR: parquet)")
    max_train_samples: int = argument(0, "images; 0: all (%(default)s)")
    no_augment: bool = argument(False, "no random crops and flips")


@dataclass(kw_only=True)
class NetArguments:
    """The model."""

    _argument_group_name: ClassVar[str] = "model"

    depth: int = argument(20, "weighted layers: 20, 32, 56, 110 (%(default)s)")
    width: int = argument(16, "channels of the first group (%(default)s)")
    block: Literal["basic", "bottleneck"] = argument("basic", "(%(default)s)")
    shortcut: Literal["A", "B"] = argument("A", "see models/resnet.py (%(default)s)")
    head_channels: list[int] = argument(
        [*resnet.HEAD_CHANNELS], "of each convolution in a head; none: pooling, a linear layer (64 64)"
    )
    head_size: int = argument(
        resnet.HEAD_SIZE, "rows and columns a head averages its input to first; 0: all (%(default)s)"
    )


@dataclass(kw_only=True)
class ResNetRunArguments(RunArguments):
    """The run, with this job's defaults."""

    max_steps: int = argument(1000, "optimizer steps (%(default)s)")
    eval_steps: int = argument(250, "0: only at the end (%(default)s)")
    max_eval_samples: int = argument(0, "test images; 0: all (%(default)s)")
    output_dir: str = argument("runs/resnet", "(%(default)s)")


@dataclass(kw_only=True)
class ResNetArguments(ImageArguments, NetArguments, ResNetRunArguments):
    """All arguments of the job."""

    _least: ClassVar[dict[str, int]] = {
        **RunArguments._least, "max_train_samples": 0, "max_eval_samples": 0, "head_size": 0
    }  # fmt: skip
    _example_config: ClassVar[str] = "configs/resnet/interlock.json"
    _may_be_empty: ClassVar[tuple[str, ...]] = ("head_channels",)


def run(args: ResNetArguments) -> Metrics:
    """Trains; see ``finetune.run``."""
    job = start(args)
    with propagate_errors():
        check_heads(job.interlock)
    images = in_turns(lambda: load_images(args.dataset, args.data_dir, args.dataset_config))
    train, test = images.train.first(args.max_train_samples), images.test.first(args.max_eval_samples)
    data = ImageData(train, test, images.num_classes)
    sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels}
    config = config_from(args, resnet.ResNetConfig, **sizes)
    net = job.build_pipeline(
        resnet.resnet_layers(config),
        loss_fn=resnet.classification_loss,
        partition_method="type:Block" if job.num_stages <= config.num_blocks else "uniform",
        head=resnet.resnet_heads(config, args.head_channels, args.head_size or None),
    )
    schedule = None if "scheduler" in job.config else step_schedule(args.max_steps)
    engine, *_ = ds_interlock.initialize(model=net, config=job.config, lr_scheduler=schedule)
    return Loop(ResNetTask(engine, args, data), args, job).run()


main = partial(run_command, "train_resnet", ResNetArguments, run, __doc__)


def check_heads(interlock: InterlockConfig) -> None:
    """Refuses a type of head that would be ignored."""
    if interlock.head.type != "auto":
        advice = "leave it out, the heads of a ResNet are set with --head_channels"
        raise ConfigError(f'interlock.head.type: "{interlock.head.type}" is for language models: {advice}')


def step_schedule(max_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Multiplies every learning rate by 0.1 after half, and again after three quarters of the steps."""

    def factor(step: int) -> float:
        return 0.1 ** ((2 * step >= max_steps) + (4 * step >= 3 * max_steps))

    return lambda optimizer: LambdaLR(optimizer, factor)


class ResNetTask(Task):
    """Images, and how many of them are classified wrongly."""

    loss_name = "test_loss"
    unit = "images"

    def __init__(self, engine: Any, args: ResNetArguments, data: ImageData) -> None:
        super().__init__(engine, args.output_dir)
        self.args, self.num_train_images = args, len(data.train)
        size = self.shape.micro_batch_size
        self.num_test_batches = num_evaluation_batches(len(data.test), size, self.shape.num_replicas)
        self.reads = engine.is_first_stage()
        with propagate_errors():
            if self.reads:
                self.normalisation = Normalisation.of(data.train)
                self.test, train = data.test.to(engine.device), data.train.to(engine.device)
                how = {"seed": args.seed, "augment": not args.no_augment, **self.share}
                # Its position is saved and restored with the engine.
                engine.set_dataiterator(ImageIterator(train, self.normalisation, size, **how))

    def before_checkpoint(self) -> None:
        """Batch norm's running statistics become the mean over the replicas, which each had their own.

        Evaluation then does not depend on which replica reads an image, and one checkpoint holds for all.
        """
        if self.shape.num_replicas == 1:
            return
        for buffer in self.engine.module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer, group=self.engine.grid.get_data_parallel_group())
                buffer /= self.shape.num_replicas

    def evaluate(self) -> Losses:
        """The model on all test images, counted exactly; the same on every rank."""
        self.before_checkpoint()
        labels: list[Tensor] = []
        batches, number = self._test_batches(labels), self.num_test_batches
        outputs = self.engine.eval_batch(batches, compute_loss=False, num_micro_batches=number)
        outputs = self.from_last_stage([logits_bv.cpu() for logits_bv in outputs or ()])
        own = Score()
        if self.reads:
            own = Score.of(torch.cat(outputs).to(self.engine.device).float(), torch.cat(labels))
        score = sum(gather(own), Score())  # each image was scored by one rank
        counts = {"num_test_images": score.num_images, "num_test_errors": score.num_errors}
        return {"test_error": score.error, "test_loss": score.loss, **counts}

    def describe(self, losses: Losses) -> str:
        return f"test error {100 * losses['test_error']:.2f} %, test loss {losses['test_loss']:.4f}"

    def export(self, trained: Trained) -> Metrics:
        """Nothing: the checkpoint is the result."""
        return {
            **trained.last,
            "images_per_second": trained.units_per_second or None,
            "depth": self.args.depth,
            "epochs": trained.step * self.shape.num_rows / self.num_train_images,
        }

    def summary(self, metrics: Metrics) -> str:
        return self.describe(metrics)

    def _test_batches(self, labels: list[Tensor]) -> Iterator[MicroBatch]:
        """The test images of this replica on stage 0; the labels of what was read go to ``labels``."""
        if not self.reads:
            return
        size = self.shape.micro_batch_size
        for images, labels_b in evaluation_batches(self.test, self.normalisation, size, **self.share):
            labels.append(labels_b)
            yield images, labels_b


if __name__ == "__main__":
    main()
