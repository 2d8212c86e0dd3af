"""The ``finetune`` job on the ranks of a pool, its data, and transformers' own word on what comes out."""

import contextlib
import io
import json
import random
import runpy
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from encoded import samples_of
from families import save_tiny as save_tiny
from families import tiny_model as tiny_model
from families import tiny_tokenizer as tiny_tokenizer
from ranks import RankPool
from safetensors.torch import load_file
from torch import Tensor

from ds_interlock.hf.data.rows import PaddedRows, Rows
from ds_interlock.hf.data.samples import encode_records
from ds_interlock.hf.data.sources import read_records

ROOT = Path(__file__).parents[2]

SEQ_LENGTH = 24
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_print": None,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
}
SGD: dict[str, Any] = {"gradient_clipping": 0.0, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
LOCAL: dict[str, Any] = {"mode": "local", "timeout_seconds": 60}
"""With two stages, window 2 is global; this mode has an auxiliary head."""


def finetune(argv: list[str]) -> str:
    """The job, as a function that the pool's ranks can call; returns what it wrote to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as written:
        run_launcher("finetune", argv)
    return written.getvalue()


def run_launcher(name: str, argv: list[str]) -> None:
    """What ``launcher/NAME.py`` does on a rank."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *argv]):
        runpy.run_path(str(ROOT / "launcher" / f"{name}.py"), run_name="__main__")


def refused(argv: list[str], module: str = "finetune") -> str | None:
    """The job, which must end itself: what this rank says of it, None if it leaves it to another."""
    try:
        import_module(f"ds_interlock.jobs.{module}").main(argv)
    except SystemExit as exit:
        return None if exit.code == 1 else str(exit.code).removeprefix(f"{module}: ")
    raise AssertionError("the job went through")


def write_lines(file: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def write_data(folder: Path, num_train: int = 60, num_valid: int = 11, most_words: int = 9) -> Path:
    """Lines of text for a language model (train.jsonl, valid.jsonl), and two classes of them."""
    draw = random.Random(0)
    words = ["ab", "ba", "abba", "cab", "bac", "aa", "bb", "cc"]
    for name, number in (("train", num_train), ("valid", num_valid)):
        texts = [" ".join(draw.choices(words, k=draw.randint(1, most_words))) for _ in range(number)]
        write_lines(folder / f"{name}.jsonl", [{"text": text} for text in texts])
        classes = [{"text": text[:12], "label": "cab" if "c" in text[:12] else "none"} for text in texts]
        write_lines(folder / f"{name}_classes.jsonl", classes)
    return folder


def arguments(
    folder: Path,
    data: Path,
    *more: object,
    section: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    task: str = "causal",
    out: str = "out",
) -> list[str]:
    """The command line to fine-tune ``folder/model`` into ``folder/out`` for two steps."""
    contents = {**CONFIG, **(config or {})}
    if section is not None:
        contents["interlock"] = section
    file = folder / "config.json"
    file.write_text(json.dumps(contents))
    suffix = "_classes" if task == "classification" else ""
    argv = [
        *("--deepspeed_config", file, "--model", folder / "model", "--task", task),
        *("--train_file", data / f"train{suffix}.jsonl", "--validation_file", data / f"valid{suffix}.jsonl"),
        *("--seq_length", SEQ_LENGTH, "--max_steps", 2, "--output_dir", folder / out),
        *more,
    ]
    return [str(word) for word in argv]


def run(
    pool: RankPool, folder: Path, data: Path, *more: object, out: str = "out", **how: Any
) -> dict[str, Any]:
    """Fine-tunes ``folder/model`` into ``folder/out``; returns the metrics."""
    pool.run(finetune, argv=arguments(folder, data, *more, out=out, **how))
    metrics: dict[str, Any] = json.loads((folder / out / "metrics.json").read_text())
    return metrics


def refusal(pool: RankPool, argv: list[str], module: str = "finetune") -> str:
    """What the job says when it must end itself; exactly one rank says it."""
    answers = [answer for answer in pool.run(refused, argv=argv, module=module) if answer is not None]
    assert len(answers) == 1, answers
    return str(answers[0])


def log_of(output: Path) -> list[dict[str, Any]]:
    """The lines of ``train_log.jsonl``."""
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


@torch.no_grad()
def loss_of(model: Any, rows: Rows) -> float:
    """Transformers' own loss: the mean over all labels, row by row."""
    total, count = 0.0, 0
    for number in range(len(rows.samples)):
        inputs, labels = rows.stack([(number,)])
        named = dict(zip(rows.names, inputs, strict=True))
        logits = model.eval()(**named).logits.float()
        chosen = labels.flatten() != -100
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        total += losses[chosen].double().sum().item()
        count += int(chosen.sum())
    return total / count


def rows_of(file: Path, tokenizer: Any = None, seq_length: int = SEQ_LENGTH) -> PaddedRows:
    """The samples of a file of JSON lines."""
    records = read_records([str(file)])
    return PaddedRows(
        samples_of(encode_records(records, tokenizer or tiny_tokenizer(), seq_length)), seq_length
    )


def state_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in a folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
