"""One short version of everything: each experiment with all its modes, batch times, report.

    python -m experiments.smoke

Models are a few channels wide and learn for a few steps, so nothing here is a result; it shows that the
whole chain runs on this machine, with its data. The output is in runs/smoke.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import batch_times, definition, report, run

FOLDER = Path("runs/smoke")
BATCH_TIMES = ["--micro_batches", "2", "--milliseconds", "2"]


def main(names: Sequence[str] = ()) -> int:
    """Runs, times and reports the shrunk versions of some experiments, by default all; the exit status."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in (definition.SMOKE + each for each in names or definition.names()):
        times = str(FOLDER / f"{name}_batch_times.json")
        status = run.main([name, "--output", str(FOLDER / f"{name}.jsonl")])
        status = status or batch_times.main([name, *BATCH_TIMES, "--output", times])
        if status:
            return status
    return report.main(["--results", str(FOLDER), "--output", str(FOLDER / "results.md")])


if __name__ == "__main__":
    sys.exit(main())
