"""How the subcommands print: progress, tables, JSON."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ds_interlock.config import InterlockConfig


def print_progress(text: str) -> None:
    """Says on standard error, where that is a terminal, what is under way."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints columns of text: the first flush left, all others flush right."""
    lines = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for first, *others in lines:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def print_json(interlock: InterlockConfig, reports: Sequence[dict[str, Any]]) -> None:
    """Prints the report of the only plan, or those of all phases with the step they begin at."""
    phases = [
        {"from_step": step, **report} for (step, _), report in zip(interlock.phases, reports, strict=True)
    ]
    print(json.dumps(reports[0] if interlock.schedule is None else {"phases": phases}, indent=2))
