"""What cheap auxiliary heads cost in quality: a small language model, trained with each of them.

    python -m benchmarks.head_quality --output head_quality.json

The model is trained on the State of the Union addresses, all stages in one process, with every setting of
the heads in turn, each from the same seeds, and once by ordinary backpropagation. Compared is the final
loss on the validation text. Every run is written to ``--output`` as it ends. The runs are short: they
separate settings that learn at different rates, and do not show where training would end.
"""

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import results
from benchmarks.language_models import plan_of
from ds_interlock.config import HeadConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.hf.data.text import BlockIterator, TokenBlocks, encode_documents, load_text
from ds_interlock.hf.data.tokenizer import load_tokenizer
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.stage.in_process import InProcessPipeline
from measuring.results import markdown

GLOBAL = "ordinary backpropagation"
SETTINGS: dict[str, dict[str, Any]] = {
    "norm_linear": {"type": "norm_linear"},
    "norm_linear, 1/8 of tokens": {"type": "norm_linear", "token_fraction": 0.125},
    # The share of the default width that rank 64 is of GPT-2 small's.
    "low_rank 8": {"type": "low_rank", "rank": 8},
    "low_rank 8, 1/4 of tokens": {"type": "low_rank", "rank": 8, "token_fraction": 0.25},
    "lens": {"type": "lens"},
    "lens, 1/4 of tokens": {"type": "lens", "token_fraction": 0.25},
    "lens, 1/8 of tokens": {"type": "lens", "token_fraction": 0.125},
}
OPTIONS: results.Options = {
    "stages": (4, "pipeline stages"),
    "windows": ([1, 2], "stages a loss reaches"),
    "settings": (list(SETTINGS), "of the heads", SETTINGS),
    "seeds": ([0, 1], "a run of each setting for each"),
    "max_steps": (150, "optimizer steps"),
    "batch_size": (32, "blocks in a step"),
    "seq_length": (64, "tokens in a block"),
    "vocab_size": (4096, "tokens of the tokenizer"),
    "width": (96, "of the hidden state"),
    "num_blocks": (4, "Transformer blocks"),
    "learning_rate": (3e-3, "largest"),
    "max_eval_samples": (128, "blocks"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and publishes after every run."""
    args = results.parse(__doc__, OPTIONS, argv)
    torch.set_num_threads(1)
    text = load_text(dataset="sotu")
    tokenizer = load_tokenizer(None, text.train, args.vocab_size)
    tokens = (encode_documents(documents, tokenizer) for documents in (text.train, text.validation))
    data = [TokenBlocks(ids, args.seq_length) for ids in tokens]
    lm = LMConfig(len(tokenizer), args.seq_length, args.width, args.num_blocks, num_heads=4)
    runs = [(GLOBAL, args.stages), *((setting, w) for w in args.windows for setting in args.settings)]
    rows: list[results.Row] = []
    for seed in args.seeds:
        for setting, window in runs:
            started = time.perf_counter()
            loss = train_one(args, replace(lm, seed=seed), *data, setting, window)
            row = {"setting": setting, "window": window, "seed": seed, "validation_loss": loss}
            rows.append({**row, "seconds": time.perf_counter() - started})
            results.publish("head_quality", args, rows, argv)


def train_one(
    args: Namespace, lm: LMConfig, train: TokenBlocks, validation: TokenBlocks, setting: str, window: int
) -> float:
    """Trains one model, and returns the mean final loss over the validation blocks."""
    plan = plan_of(window, lm, args.stages)
    heads = head_factory(HeadConfig(**SETTINGS.get(setting, {})), lm_layers(lm))
    net = InProcessPipeline(build_lm(lm), lm_loss(), plan, heads)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine(args.max_steps))
    blocks = BlockIterator(train, args.batch_size, seed=lm.seed)
    torch.manual_seed(lm.seed)  # of the positions that a head samples
    for _ in range(args.max_steps):
        optimizer.zero_grad()
        net.accumulate_gradients([next(blocks)])
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    batches = BlockIterator(validation, args.batch_size, shuffle=False)
    losses = [
        net.evaluate([next(batches)])[plan.final].item()
        for _ in range(min(args.max_eval_samples // args.batch_size, batches.num_micro_batches))
    ]
    return statistics.fmean(losses)


def warmup_then_cosine(num_steps: int) -> Any:
    """Share of the largest learning rate: a tenth of the steps upwards, then a half cosine to a tenth."""
    warmup = max(1, num_steps // 10)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))

    return share


def table(found: dict[str, Any]) -> str:
    """Validation loss for each setting and window: the mean over seeds, and half of their range."""
    windows = found["arguments"]["windows"]
    lines = [
        [setting, *(_summary(rows, window) for window in windows)]
        for setting, rows in results.grouped(found["rows"], "setting").items()
    ]
    return markdown(["heads", *(f"window {window}" for window in windows)], lines)


def _summary(rows: list[results.Row], window: int) -> str:
    """Of a setting at a window; ordinary backpropagation has the same losses for every window."""
    losses = [row["validation_loss"] for row in rows if row["setting"] == GLOBAL or row["window"] == window]
    return f"{statistics.fmean(losses):.3f} ± {(max(losses) - min(losses)) / 2:.3f}" if losses else ""


if __name__ == "__main__":
    main()
