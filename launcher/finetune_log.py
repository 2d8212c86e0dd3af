"""``train_log.jsonl``: a line of JSON for each report of a run, which a resumed run goes on with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job import with_nulls

from ds_interlock.files import replace_text


class TrainLog:
    """The log of one run. Used on rank 0.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, step: int) -> None:
        """Keeps what was told up to ``step``, 0 for a new run; what came later will come again."""
        kept = [entry for entry in self.entries() if step > 0 and entry["step"] <= step]
        replace_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line; NaN becomes null."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(with_nulls(entry)) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """All lines but one that was cut off; none if there is no file."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # behind the last line's end there is nothing

    def evaluations(self) -> dict[int, dict[str, float]]:
        """What was evaluated, by step."""
        return {entry["step"]: entry for entry in self.entries() if entry.get("eval_loss") is not None}
