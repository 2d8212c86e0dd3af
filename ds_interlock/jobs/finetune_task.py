"""What ``finetune`` gives to the training loop: a Hugging Face model's data, evaluation and export.

The ranks of stage 0 read and encode the data; the others get what they must know.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch.distributed as dist

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.batches import EvaluationBatches, TrainingBatches
from ds_interlock.hf.data.records import Record
from ds_interlock.hf.data.rows import ClassifiedRows, PackedRows, PaddedRows, Rows, padding_id
from ds_interlock.hf.data.samples import encode_classified, encode_records
from ds_interlock.hf.data.sources import RecordData, load_records
from ds_interlock.hf.export.checkpoint import ModelDescription
from ds_interlock.hf.export.model import export_model
from ds_interlock.hf.model import base_states
from ds_interlock.hf.model.base_states import Share
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.jobs.finetune_arguments import FinetuneArguments
from ds_interlock.jobs.hugging_face import write_description
from ds_interlock.jobs.loop import Losses, Metrics, Task, Trained, perplexity
from ds_interlock.jobs.process import broadcast_from_rank_0, gather, propagate_errors, writing

Data: TypeAlias = tuple[Rows, Rows]  # to train on, and to validate on


def read_data(args: FinetuneArguments, *, has_data: bool) -> tuple[RecordData | None, tuple[str, ...]]:
    """The records, None on ranks without data; names of their classes by id. All ranks must call it."""
    records: RecordData | None = None
    with propagate_errors():
        if has_data:
            files = args.train_file, args.validation_file
            how: dict[str, Any] = {"task": args.task, "seed": args.seed}
            records = load_records(*files, args.dataset, args.dataset_config, **how)
    return records, broadcast_from_rank_0(records.classes if records else ())


def encode(
    args: FinetuneArguments, records: RecordData | None, pretrained: Pretrained
) -> tuple[Data | None, tuple[str, ...]]:
    """The records in rows, and the names of the model's arguments that they hold. All ranks must call it."""

    def fill_rows(some: Sequence[Record], what: str, most: int | None) -> Rows:
        tokenizer = pretrained.tokenizer
        kind: type[Rows] = PackedRows if args.packing else PaddedRows
        if args.task == "classification":
            assert records is not None, "there are records to encode"
            kind = ClassifiedRows
            encoded = encode_classified(some, tokenizer, args.seq_length, records.label_ids)
        else:
            encoded = encode_records(some, tokenizer, args.seq_length)
        if dist.get_rank() == 0:
            print(f"{what}: {encoded.summary()}")
        vocab_size = pretrained.config.get_text_config().vocab_size
        rows = kind(encoded.samples[:most], args.seq_length, padding_id(tokenizer, vocab_size))
        _check_vocabulary(rows, vocab_size, pretrained.name)
        return rows

    data = None
    with propagate_errors():
        if records is not None:
            train = fill_rows(records.train, "training", args.max_train_samples)
            data = train, fill_rows(records.validation, "validation", args.max_eval_samples)
    return data, broadcast_from_rank_0(data[0].names if data else ())


def _check_vocabulary(rows: Rows, known: int, model: str) -> None:
    largest = max((max(sample.ids) for sample in rows.samples), default=0)
    if largest >= known:
        raise ConfigError(
            f"--model {model}: its tokenizer gives the token id {largest}, and the model knows "
            f"{known} tokens (vocab_size): tokenizer and weights do not belong together"
        )


class FinetuneTask(Task):
    """A Hugging Face model and its samples."""

    loss_name = "eval_loss"
    evaluates_first = True
    keeps_best = True

    def __init__(
        self,
        engine: Any,
        args: FinetuneArguments,
        data: Data | None,
        pretrained: Pretrained,
        description: ModelDescription,
    ) -> None:
        super().__init__(engine, args.output_dir)
        self.args, self.pretrained, replica = args, pretrained, self.replica
        self.training: TrainingBatches | None = None
        self.validation: EvaluationBatches | None = None
        with propagate_errors(), writing(self.output):
            if data is not None:
                train, validation = data
                self.training = TrainingBatches(train, self.shape, replica=replica, seed=args.seed)
                engine.set_dataiterator(self.training)  # its position is saved and restored with the engine
                self.validation = EvaluationBatches(validation, self.shape, replica=replica)
            if dist.get_rank() == 0:
                write_description(self.output, pretrained, description)
        self.num_eval_batches = broadcast_from_rank_0(self.validation.num_batches if self.validation else 0)

    def begin(self, step: int) -> None:
        """If heads learn from the base model (``head.kl_weight``), sends its states along with the labels.

        A new run computes them; a resumed one must find them where the first part of it left them.
        """
        if self.engine.interlock.head.kl_weight == 0 or not self.engine.module.schedule.heads:
            return
        folder, pretrained, own = self.output / base_states.FOLDER, self.pretrained, None
        width = int(pretrained.config.get_text_config().hidden_size)  # of what goes into the unembedding
        shares: list[Share] = []  # of all replicas
        with propagate_errors():
            if self.training is not None:
                rows, model = self.training.rows, base_states.digest_of_model(pretrained.folder)
                replicas = range(self.shape.num_replicas)
                batches = [EvaluationBatches(rows, self.shape, replica=r) for r in replicas]
                shares = [Share.of(of_replica, model) for of_replica in batches]
                own = batches[self.replica], shares[self.replica]
            if step == 0 and dist.get_rank() == 0:
                num_positions = sum(sum(share.lengths) for share in shares)
                num_bytes = num_positions * width * pretrained.dtype.itemsize
                base_states.check_room(folder, num_bytes)
                print(
                    f"interlock.head.kl_weight: the base model's hidden states at {num_positions} positions "
                    f"go to {folder}, {num_bytes / 1e9:.2f} GB"
                )
        if step == 0:
            base_states.record(self.engine, folder, own, width, pretrained.dtype)
        with propagate_errors():
            if self.training is not None:
                self.training.base_of_rows = base_states.BaseStates(folder, shares).stack

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
        self.exported = export_model(
            trained.best_checkpoint if args.load_best_model_at_end else trained.checkpoint,
            self.output / ("adapter" if is_adapter else "hf"),
            max_shard_size=args.max_shard_size,
            heads=args.export_heads and not is_adapter,
            merge_adapter=bool(args.lora_r) and not is_adapter,
            trust_remote_code=args.trust_remote_code,
        )
        return {f"first_{name}": loss for name, loss in trained.first.items()} | trained.last

    def summary(self, metrics: Metrics) -> str:
        before = metrics.get("first_eval_loss", math.nan)
        return f"validation loss {before:.4f} before, {metrics['eval_loss']:.4f} after\n{self.exported}"
