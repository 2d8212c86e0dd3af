"""What a run reports: a bar or lines on the terminal, lines of ``train_log.jsonl``, ``metrics.json``."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_interlock.files import replace_text


class Progress:
    """Shows a run up to ``max_steps`` on one rank: a bar on a terminal, else one line per report."""

    def __init__(self, step: int, max_steps: int, *, shows: bool) -> None:
        self.shows, self.max_steps = shows, max_steps
        how = {"disable": None if shows else True}  # None: shown on a terminal only
        self.bar = tqdm(total=max_steps, initial=step, unit="step", file=sys.stdout, leave=False, **how)

    def report(self, step: int, values: Mapping[str, str]) -> None:
        """Shows the newest ``values`` by their names."""
        if not self.bar.disable:
            self.bar.set_postfix(values)
        else:
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            self.write(f"step {step}/{self.max_steps}: {listed}")

    def write(self, line: str) -> None:
        """A line that stays."""
        if self.shows:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


class TrainLog:
    """``train_log.jsonl``, a line of JSON for each report, which a resumed run continues. Used on rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Keeps the entries up to ``step``, 0 for a new run; later ones will be written again."""
        before = [entry for entry in self._entries() if step > 0 and entry["step"] <= step]
        replace_text(self.path, "".join(json.dumps(entry) + "\n" for entry in before))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line; NaN becomes null."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(with_nulls(entry)) + "\n")

    def evaluations(self, loss_name: str) -> dict[int, dict[str, float]]:
        """The evaluations by step: entries that have ``loss_name``."""
        return {entry["step"]: entry for entry in self._entries() if entry.get(loss_name) is not None}

    def _entries(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # what follows the last line's end is incomplete


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Writes a file of JSON as a whole; NaN becomes null."""
    replace_text(path, json.dumps(with_nulls(metrics), indent=2, allow_nan=False) + "\n")


def with_nulls(content: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinities, which JSON does not know, as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
