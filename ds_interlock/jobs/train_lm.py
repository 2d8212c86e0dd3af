"""Trains a decoder-only Transformer on text from scratch, in stages; the DeepSpeed config says in which mode.

    deepspeed --num_gpus 4 launcher/train_lm.py --deepspeed_config configs/interlock.json --dataset sotu

The model is a small one of this project's, or any of transformers': ``--config_name``, a name on the hub, a
config.json, or a model type such as llama, with ``--config_overrides hidden_size=256,num_hidden_layers=4``.
It writes to ``--output_dir``: ``checkpoints/`` to resume from, ``hf/`` with the model as a Hugging Face
checkpoint, ``metrics.json``, ``train_log.jsonl``, and ``timeline.svg`` with a typical batch. Without this
repository's files: ``deepspeed --module ds_interlock.jobs.train_lm``.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import ds_interlock
from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.batches import BatchShape
from ds_interlock.hf.data.sources import Records
from ds_interlock.hf.data.streaming import StreamingBatches, names_of_streams, rows_of_stream
from ds_interlock.hf.data.text import (
    BlockIterator,
    BlockRows,
    Documents,
    TokenBlocks,
    Tokens,
    encode_blocks,
    mix_blocks,
    tokenise_documents,
    unigram_perplexity,
)
from ds_interlock.hf.data.tokenizer import load_tokenizer
from ds_interlock.hf.export.lm import export_gpt2, read_layer_states
from ds_interlock.hf.export.model import export_model
from ds_interlock.hf.model.balance import default_bounds, describe, parse_bounds
from ds_interlock.hf.model.check import check_layers
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.hf.model.scratch import configuration, draw_weights
from ds_interlock.jobs.arguments import CompilationArguments, RunArguments, argument, config_from
from ds_interlock.jobs.data import Opened, TextArguments, read_data, stream
from ds_interlock.jobs.hugging_face import (
    build_language_model,
    check_seq_length,
    compile_blocks,
    describe_for_export,
    write_description,
)
from ds_interlock.jobs.loop import Loop, Losses, Metrics, Task, Trained, perplexity
from ds_interlock.jobs.process import (
    Job,
    broadcast_from_rank_0,
    in_turns,
    propagate_errors,
    run_command,
    start,
)
from ds_interlock.models.lm import LMConfig, lm_layers, lm_loss

_EVALUATED_AT_ONCE = 16
_PROMPT_TOKENS = 8
_STEPS = 400  # unless --max_steps says otherwise


@dataclass(kw_only=True)
class DocumentArguments(TextArguments):
    """What it learns from."""

    tokenizer: str | None = argument(None, "sentencepiece .model, or Hugging Face name; default: train one")
    vocab_size: int = argument(2048, "of a trained tokenizer (%(default)s)")
    seq_length: int = argument(128, "tokens in a block (%(default)s)")


@dataclass(kw_only=True)
class TransformerArguments:
    """The small model of this project."""

    _argument_group_name: ClassVar[str] = "model"

    width: int = argument(128, "of the hidden state (%(default)s)")
    num_blocks: int = argument(8, "Transformer blocks (%(default)s)")
    num_heads: int = argument(4, "attention heads of a block (%(default)s)")
    dropout: float = argument(0.0)
    label_smoothing: float = argument(0.0)
    tie_embeddings: bool = argument(False, "token embedding serves as unembedding")


@dataclass(kw_only=True)
class ConfigurationArguments:
    """A model of transformers instead."""

    _argument_group_name: ClassVar[str] = "a model of transformers"

    config_name: str | None = argument(
        None, "name on the hub, folder, config.json, or model type", metavar="NAME_OR_PATH"
    )
    config_overrides: str | None = argument(
        None, "hidden_size=256,num_hidden_layers=4, ...", metavar="KEY=VALUE,..."
    )
    trust_remote_code: bool = argument(False, "run code that comes with the configuration")
    stage_bounds: str | None = argument(
        None, "first layer of each stage, and number of layers (default: equal work)", metavar="0,9,18,33"
    )


@dataclass(kw_only=True)
class LMRunArguments(RunArguments):
    """The run, with this job's defaults."""

    max_steps: int = argument(-1, f"optimizer steps ({_STEPS}; --streaming needs it)")
    eval_steps: int = argument(100, "0: only at the end (%(default)s)")
    max_eval_samples: int = argument(256, "blocks; 0: all (%(default)s)")
    output_dir: str = argument("runs/lm", "(%(default)s)")
    generate: int = argument(64, "tokens to sample at the end (%(default)s)")


@dataclass(kw_only=True)
class LMArguments(
    DocumentArguments, TransformerArguments, ConfigurationArguments, LMRunArguments, CompilationArguments
):
    """All arguments of the job; ConfigError if they make no sense, as far as that takes no file."""

    _least: ClassVar[dict[str, int]] = {
        **RunArguments._least,
        "max_eval_samples": 0,
        "generate": 0,
        "preprocessing_num_workers": 1,
    }

    def __post_init__(self) -> None:
        self.max_steps = self.steps(self.max_steps, _STEPS)
        super().__post_init__()
        if self.streaming and self.tokenizer is None:
            raise ConfigError("--streaming needs --tokenizer: training one takes all text beforehand")
        _ = self.parts  # which raises an error if weights are missing
        of_ours = {entry.name: entry.default for entry in fields(TransformerArguments)}
        del of_ours["label_smoothing"]
        of_theirs = {entry.name: entry.default for entry in fields(ConfigurationArguments)}
        del of_theirs["config_name"]
        others, why = of_ours, "is of the model that is trained without --config_name: use --config_overrides"
        if self.config_name is None:
            others, why = of_theirs, "needs --config_name, a model of transformers"
        for name, default in others.items():
            if getattr(self, name) != default:
                raise ConfigError(f"--{name} {why}")


def run(args: LMArguments) -> Metrics:
    """Trains, and exports the model; see ``finetune.run``."""
    job = start(args)
    tokenizer, text = _read_text(args, has_data=job.has_data)
    if args.config_name is None:
        engine, export = _own_model(args, job, tokenizer)
    else:
        engine, export = _model_of_transformers(args, job, tokenizer)
    torch.manual_seed(args.seed + dist.get_rank())  # every stage and replica drops out other units
    return Loop(LMTask(engine, args, text, tokenizer, export), args, job).run()


@dataclass(frozen=True)
class Text:
    """What a rank of stage 0 trains on and validates on."""

    train: TokenBlocks | None  # None: it is streamed
    validation: TokenBlocks
    batches: Callable[[Any, BatchShape], BlockIterator | StreamingBatches]
    """The batches to train on, for an engine."""


def _read_text(args: LMArguments, *, has_data: bool) -> tuple[PreTrainedTokenizerBase, Text | None]:
    """The tokenizer, and on the ranks of stage 0 the text. All ranks must call it."""
    most = args.max_eval_samples * args.seq_length or None  # documents: each has a token at least
    data = read_data(args, "text", args.seed, most, has_data=has_data)
    tokenizer = None
    with propagate_errors():
        if dist.get_rank() == 0 and data:
            documents = Documents(*(part.train for part in data.parts))
            tokenizer = load_tokenizer(args.tokenizer, documents, args.vocab_size, documents.key)
    tokenizer = broadcast_from_rank_0(tokenizer)
    assert tokenizer is not None, "rank 0 belongs to stage 0, which has the data"

    return tokenizer, in_turns(lambda: None if data is None else _cut(args, data, tokenizer))


def _cut(args: LMArguments, data: Opened, tokenizer: PreTrainedTokenizerBase) -> Text:
    def blocks_of(parts: Sequence[Records], weights: Sequence[float] | None) -> TokenBlocks:
        tokens = [tokenise_documents(part, tokenizer, args.preprocessing_num_workers) for part in parts]
        return mix_blocks([TokenBlocks(part, args.seq_length) for part in tokens], weights, args.seed)

    validation = blocks_of(data.validation, None)
    if args.streaming:
        fill: Any = partial(BlockRows, seq_length=args.seq_length)
        encode = partial(encode_blocks, tokenizer=tokenizer, seq_length=args.seq_length)
        of_epoch = partial(rows_of_stream, data.streams, args.weights, encode, fill, "text")
        sources = names_of_streams(data.streams, args.weights)
        return Text(None, validation, partial(stream, of_epoch, fill, args.seed, sources))
    train = blocks_of([part.train for part in data.parts], args.weights)

    def batches(engine: Any, shape: BatchShape) -> BlockIterator:
        train.require(shape.num_rows, "training")
        place = {"replica": engine.grid.get_data_parallel_rank(), "num_replicas": shape.num_replicas}
        return BlockIterator(train, shape.micro_batch_size, **place, seed=args.seed)

    return Text(train, validation, batches)


@dataclass(frozen=True)
class Export:
    """How the model is exported."""

    write: Callable[[Path, Path], None]
    """From a checkpoint to a Hugging Face folder."""
    prepare: Callable[[], None] = lambda: None
    """Called on all ranks when training begins: writes what ``write`` needs beside the checkpoints."""


def _own_model(args: LMArguments, job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Export]:
    lm = config_from(args, LMConfig, vocab_size=len(tokenizer))
    net = job.build_pipeline(
        lm_layers(lm),
        loss_fn=lm_loss(lm.label_smoothing),
        partition_method="type:Block" if job.num_stages <= lm.num_blocks else "uniform",
    )
    with propagate_errors():
        compile_blocks(net.forward_funcs, args)
    engine, *_ = ds_interlock.initialize(model=net, config=job.config)

    def write(checkpoint: Path, folder: Path) -> None:
        export_gpt2(read_layer_states(checkpoint), lm, folder, tokenizer)

    return engine, Export(write)


def _model_of_transformers(
    args: LMArguments, job: Job, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, Export]:
    dtype = torch.bfloat16 if job.config.get("bf16", {}).get("enabled") else torch.float32
    model = in_turns(lambda: _draw(args, tokenizer, dtype))
    with propagate_errors():
        blueprint = model.blueprint()
        if args.stage_bounds:
            bounds = parse_bounds(args.stage_bounds)
        else:
            bounds = default_bounds(blueprint, job.interlock, job.num_stages)
        how: Any = {"label_smoothing": args.label_smoothing, "base_seed": args.seed}
        net = build_language_model(job, blueprint, bounds, **how)
        compile_blocks(net.forward_funcs, args, blueprint.routing)
        if dist.get_rank() == 0:
            print(describe(blueprint, bounds))
    engine, *_ = ds_interlock.initialize(model=net, config=job.config)
    with propagate_errors():
        check_layers(engine, model, args.seq_length, ("input_ids",))
    trust = args.trust_remote_code

    def write(checkpoint: Path, folder: Path) -> None:
        print(export_model(checkpoint, folder, trust_remote_code=trust))

    description = describe_for_export(model, blueprint)
    return engine, Export(write, partial(write_description, Path(args.output_dir), model, description))


def _draw(args: LMArguments, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Pretrained:
    name = str(args.config_name)
    config = configuration(name, args.config_overrides, tokenizer, trust_remote_code=args.trust_remote_code)
    model = draw_weights(name, config, tokenizer, args.seed, dtype)
    check_seq_length(model, args.seq_length, ", or --config_overrides max_position_embeddings=...")
    return model


main = partial(run_command, "train_lm", LMArguments, run, __doc__)


class LMTask(Task):
    """Text, and a Hugging Face folder at the end."""

    loss_name = "validation_loss"
    unit = "tokens"

    def __init__(
        self,
        engine: Any,
        args: LMArguments,
        text: Text | None,
        tokenizer: PreTrainedTokenizerBase,
        export: Export,
    ) -> None:
        super().__init__(engine, args.output_dir)
        self.args, self.tokenizer, self._export = args, tokenizer, export
        self.units_per_sample = args.seq_length
        self.text = text
        num_blocks = 0
        with propagate_errors():
            if text is not None:
                # Its position is saved and restored with the engine.
                engine.set_dataiterator(text.batches(engine, self.shape))
                text.validation.require(self.shape.num_rows, "validation")
                num_blocks = min(len(text.validation), args.max_eval_samples or sys.maxsize)
        self.num_eval_batches = broadcast_from_rank_0(max(1, num_blocks // self.shape.num_rows))

    def begin(self, step: int) -> None:
        self._export.prepare()

    def evaluate(self) -> Losses:
        data, size = None, self.shape.micro_batch_size
        if self.text is not None:
            data = BlockIterator(self.text.validation, size, **self.share, shuffle=False)
        losses = [self.engine.eval_batch(data).item() for _ in range(self.num_eval_batches)]
        loss = math.fsum(losses) / len(losses)
        return {"validation_loss": loss, "validation_perplexity": perplexity(loss)}

    def describe(self, losses: Losses) -> str:
        loss, of_tokens = losses["validation_loss"], losses["validation_perplexity"]
        return f"validation loss {loss:.4f}, perplexity {of_tokens:.2f}"

    def export(self, trained: Trained) -> Metrics:
        """Writes ``hf/`` and evaluates it as a user would: from the folder alone."""
        assert self.text is not None, "rank 0 belongs to stage 0, which has the data"
        training, validation = self.text.train, self.text.validation
        folder = self.output / "hf"
        self._export.write(trained.checkpoint, folder)
        trust = {"trust_remote_code": self.args.trust_remote_code}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust)
        num_blocks = self.num_eval_batches * self.shape.num_rows
        metrics = {
            **trained.last,
            "exported_validation_loss": _loss_of(model, validation, num_blocks),
            "tokens_per_second": trained.units_per_second,
        }
        if training is not None:
            _, validated = validation.stack(range(num_blocks))
            pieces = training.tokens.pieces
            metrics["unigram_perplexity"] = unigram_perplexity(pieces, validated, len(self.tokenizer))
        if num := self.args.generate:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            self.sample = _sample(model, tokenizer, validation.tokens, num, self.args.seed)
        return metrics

    def summary(self, metrics: Metrics) -> str:
        lines = [
            f"validation perplexity  {metrics['validation_perplexity']:10.2f}",
            f"validation loss        {metrics['validation_loss']:10.4f}  in the pipeline",
            f"                       {metrics['exported_validation_loss']:10.4f}  from {self.output / 'hf'}",
        ]
        if "unigram_perplexity" in metrics:
            lines.insert(1, f"unigram perplexity     {metrics['unigram_perplexity']:10.2f}")
        if self.args.generate:
            lines.append(f"\na sample:\n{self.sample}")
        return "\n".join(lines)


@torch.no_grad()
def _loss_of(model: Any, blocks: TokenBlocks, num_blocks: int) -> float:
    """Mean loss of the exported model over the first ``num_blocks`` blocks."""
    loss_fn, total = lm_loss().eval(), 0.0
    for first in range(0, num_blocks, _EVALUATED_AT_ONCE):
        numbers = range(first, min(first + _EVALUATED_AT_ONCE, num_blocks))
        inputs_bt, labels_bt = blocks.stack(numbers)
        total += loss_fn(model(inputs_bt).logits, labels_bt).item() * len(numbers)
    return total / num_blocks


def _sample(model: Any, tokenizer: Any, tokens: Tokens, num_generated: int, seed: int) -> str:
    torch.manual_seed(seed)
    prompt = tokens[:_PROMPT_TOKENS][None]
    most = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max(1, min(num_generated, most - prompt.shape[1])),
        do_sample=True,
        top_p=0.9,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
