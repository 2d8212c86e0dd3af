"""``train_log.jsonl``: a line of JSON for each report of a run, which a resumed run continues."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_interlock.files import replace_text
from ds_interlock.jobs.process import with_nulls


class TrainLog:
    """The log of one run. Used on rank 0.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Keeps the entries up to ``step``, 0 for a new run; later ones will be written again."""
        kept = [entry for entry in self.entries() if step > 0 and entry["step"] <= step]
        replace_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line; NaN becomes null."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(with_nulls(entry)) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """All complete lines; none if the file does not exist."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # nothing follows the last line's end

    def evaluations(self, loss_name: str) -> dict[int, dict[str, float]]:
        """The evaluations by step: entries that have ``loss_name``."""
        return {entry["step"]: entry for entry in self.entries() if entry.get(loss_name) is not None}
