"""What ``finetune`` gives to the training loop: a Hugging Face model's data, evaluation and export."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from ds_interlock.hf.data.batches import EvaluationBatches, TrainingBatches
from ds_interlock.hf.export.checkpoint import ModelDescription
from ds_interlock.hf.export.model import export_model
from ds_interlock.hf.model import base_states
from ds_interlock.hf.model.base_states import Share
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.finetune_data import Data, Training
from ds_interlock.jobs.hugging_face import write_description
from ds_interlock.jobs.loop import Losses, Metrics, Task, Trained, perplexity
from ds_interlock.jobs.model_card import push, write_card
from ds_interlock.jobs.process import broadcast_from_rank_0, gather, propagate_errors, writing


class FinetuneTask(Task):
    """A Hugging Face model and its samples."""

    loss_name = "eval_loss"
    keeps_best = True

    def __init__(
        self,
        engine: Any,
        args: FinetuneArguments,
        data: Data | None,
        pretrained: Pretrained,
        description: ModelDescription,
        config: Mapping[str, Any],
    ) -> None:
        super().__init__(engine, args.output_dir)
        self.args, self.pretrained, replica = args, pretrained, self.replica
        self.data, self.config, self.description = data, config, description
        self.evaluates_first, self.patience = args.eval_on_start, args.early_stopping_patience
        self.training: Training | None = None
        self.validation: EvaluationBatches | None = None
        with propagate_errors(), writing(self.output):
            if data is not None:
                self.training = data.batches(engine, self.shape)
                engine.set_dataiterator(self.training)  # its position is saved and restored with the engine
                self.validation = EvaluationBatches(data.validation, self.shape, replica=replica)
        self.num_eval_batches = broadcast_from_rank_0(self.validation.num_batches if self.validation else 0)

    def begin(self, step: int) -> None:
        """Writes what exports of the checkpoints need; and what heads need that learn from the base model.

        A new run records its states for them (``head.objective``); a resumed one must find them where the
        first part of it left them.
        """
        write_description(self.output, self.pretrained, self.description)
        module, shares, batches = self.engine.module, list[Share](), None
        layers = base_states.recorded_layers(module)
        if not layers:
            return
        folder, pretrained = self.output / base_states.FOLDER, self.pretrained
        width = int(pretrained.config.get_text_config().hidden_size)  # of what goes into the unembedding
        with propagate_errors():
            if self.data is not None and self.data.train is not None:
                rows, model = self.data.train, base_states.digest_of_model(pretrained.folder)
                replicas = range(self.shape.num_replicas)
                of_all = [EvaluationBatches(rows, self.shape, replica=r) for r in replicas]
                shares, batches = [Share.of(of_replica, model) for of_replica in of_all], of_all[self.replica]
            if step == 0 and dist.get_rank() == 0:
                num_positions = sum(sum(share.lengths) for share in shares)
                num_bytes = num_positions * width * pretrained.dtype.itemsize * len(layers)
                base_states.check_room(folder, num_bytes)
                print(
                    f"interlock.head.objective: the base model's hidden states at {num_positions} positions, "
                    f"after {len(layers)} layers, go to {folder}, {num_bytes / 1e9:.2f} GB"
                )
        shares = base_states.from_stage_0(self.engine, shares)
        if step == 0:
            base_states.record(self.engine, folder, batches, shares[self.replica], width, pretrained.dtype)
        with propagate_errors():
            base_states.attach(module, folder, shares)
            if isinstance(self.training, TrainingBatches):
                self.training.places_of_rows = base_states.Places(shares).stack

    def evaluate(self) -> Losses:
        """The losses on the validation data, of all heads, exact means over its labels; on every rank."""
        data: Iterator[Any] | None = None if self.validation is None else iter(self.validation)
        sums: Losses = {}
        with self._predictions() as predicted:
            for _ in range(self.num_eval_batches):
                _, losses = self.engine.eval_batch(data, return_head_losses=True)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + loss
        num = self.num_eval_batches
        means = {f"eval_{name.replace('final_loss', 'loss')}": total / num for name, total in sums.items()}
        if self.args.task == "causal":
            means |= {name.replace("loss", "perplexity"): perplexity(loss) for name, loss in means.items()}
        else:
            means["eval_accuracy"] = self._accuracy(predicted)
        return means

    @contextmanager
    def _predictions(self) -> Iterator[list[int]]:
        """On the last stage collects the most likely classes of what it evaluates, row by row."""
        classes: list[int] = []
        if self.args.task != "classification" or not self.engine.is_last_stage():
            yield classes
            return
        end = self.engine.module.forward_funcs[-1]
        with end.register_forward_hook(lambda *call: classes.extend(call[-1].argmax(-1).tolist())):
            yield classes

    def _accuracy(self, predicted: list[int]) -> float:
        """The share of validation samples whose class was predicted: labels are known on stage 0 only."""
        predicted = self.from_last_stage(predicted)
        right = total = 0
        if self.validation is not None:
            labels = [int(label) for _, (labels_b, _) in self.validation for label in labels_b]
            right = sum(label == guess for label, guess in zip(labels, predicted, strict=True))
            total = sum(label >= 0 for label in labels)
        counts = gather((right, total))
        return sum(right for right, _ in counts) / sum(total for _, total in counts)

    def describe(self, losses: Losses) -> str:
        if self.args.task == "causal":
            quality = f"perplexity {losses['eval_perplexity']:.2f}"
        else:
            quality = f"accuracy {losses['eval_accuracy']:.1%}"
        return f"validation loss {losses['eval_loss']:.4f}, {quality}"

    def export(self, trained: Trained) -> Metrics:
        """Writes ``hf/``, a plain Hugging Face folder, or ``adapter/`` in peft's format."""
        args, is_adapter = self.args, self.args.exports_adapter
        folder = self.output / ("adapter" if is_adapter else "hf")
        self.exported = export_model(
            trained.best_checkpoint if args.load_best_model_at_end else trained.checkpoint,
            folder,
            max_shard_size=args.max_shard_size,
            heads=args.export_heads and not is_adapter,
            merge_adapter=bool(args.lora_r) and not is_adapter,
            trust_remote_code=args.trust_remote_code,
        )
        metrics = {f"first_{name}": loss for name, loss in trained.first.items()} | trained.last
        assert self.data is not None, "rank 0 belongs to stage 0, which has the data"
        about = {"steps": trained.step, **metrics}
        if args.load_best_model_at_end:
            of_best = dict(trained.best)
            about |= {"steps": of_best.pop("step"), **of_best}
        write_card(folder, args, self.config, self.data.describe(), about)
        if args.push_to_hub:
            print(f"pushed to {push(folder, args)}")
        return metrics

    def summary(self, metrics: Metrics) -> str:
        before = metrics.get("first_eval_loss", math.nan)
        return f"validation loss {before:.4f} before, {metrics['eval_loss']:.4f} after\n{self.exported}"
