"""How far a job is: a bar on a terminal, elsewhere a line for each report."""

import sys
from collections.abc import Mapping

from tqdm import tqdm


class Progress:
    """Shows a run from ``step`` to ``max_steps``, on one rank."""

    def __init__(self, step: int, max_steps: int, *, shows: bool) -> None:
        self.shows = shows
        self.max_steps = max_steps
        has_bar = shows and sys.stdout.isatty()
        self.bar = tqdm(
            total=max_steps, initial=step, unit="step", file=sys.stdout, disable=not has_bar, leave=False
        )

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
