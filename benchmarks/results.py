"""What a benchmark leaves: a JSON file, and a table and mostly a plot that are made from it alone.

    python -m benchmarks.NAME --output NAME.json    # measures, prints a table; writes NAME.json, NAME.svg
    python -m benchmarks.results NAME.json          # table and plot again, from the JSON

A benchmark is a module with ``OPTIONS``, ``main(argv)``, ``table(results)``, which returns Markdown, and,
if it has a plot, ``draw(results)``, which returns a figure; ``results`` is what ``publish`` writes.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ds_interlock.files import replace_text
from measuring.results import machine, versions

Row = dict[str, Any]
Options = Mapping[str, tuple[Any, ...]]
"""By name: the default, what it is, and, if only some values are allowed, these."""


def parse(description: str | None, options: Options, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a benchmark: its options, and ``--output``.

    An option has the type of its default; a list takes one value or more.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    for name, (default, meaning, *choices) in options.items():
        several = isinstance(default, list)
        parser.add_argument(
            f"--{name}",
            type=type(default[0] if several else default),
            nargs="+" if several else None,
            default=default,
            choices=choices[0] if choices else None,
            metavar="NAME" if several and choices else None,
            help=f"{meaning} (%(default)s)",
        )
    parser.add_argument("--output", type=Path, help="write the results to this JSON file, a plot beside it")
    return parser.parse_args(argv)


def publish(
    benchmark: str, args: argparse.Namespace, rows: list[Row], argv: Sequence[str] | None, **more: Any
) -> None:
    """Prints the table of ``rows``; with ``--output`` writes the JSON file, and beside it the plot.

    ``argv`` is what ``args`` was parsed from; ``more`` goes into the file too.
    """
    words = ["python", "-m", f"benchmarks.{benchmark}", *(sys.argv[1:] if argv is None else argv)]
    results = {
        "benchmark": benchmark,
        "command": shlex.join(words),
        "arguments": {name: value for name, value in vars(args).items() if name != "output"},
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        **more,
    }
    text = json.dumps(results, indent=1) + "\n"
    if args.output:
        replace_text(args.output, text)
    show(json.loads(text), args.output)


def show(results: dict[str, Any], output: Path | None) -> None:
    """Prints the table of ``results``; with ``output`` writes the plot as an SVG beside it."""
    benchmark = import_module(f"benchmarks.{results['benchmark']}")
    print("\n" + benchmark.table(results), flush=True)
    if output and hasattr(benchmark, "draw"):
        benchmark.draw(results).savefig(output.with_suffix(".svg"))


def grouped(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    """The rows by their value of ``key``."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def main(argv: Sequence[str] | None = None) -> None:
    """Shows the results in a file."""
    parser = argparse.ArgumentParser(description="Shows a benchmark's table and plot again, from its JSON.")
    parser.add_argument("results", type=Path, help="JSON file that a benchmark has written")
    path = parser.parse_args(argv).results
    show(json.loads(path.read_text(encoding="utf-8")), path)


if __name__ == "__main__":
    main()
