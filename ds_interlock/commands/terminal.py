"""What several subcommands take on the command line, and how they print: progress, tables, JSON."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ds_interlock.config import InterlockConfig


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], *, summary: str, description: str
) -> argparse.ArgumentParser:
    """Adds a subcommand; ``run`` gets its options and returns the exit status."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def at_least_one(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """An argument that measures something."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return value


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
