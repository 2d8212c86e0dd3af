"""What a benchmark leaves: a JSON file, and a table of the rows in it.

    python -m benchmarks.NAME --output NAME.json    # measures, prints a table; writes NAME.json
    python -m benchmarks.results NAME.json          # the table again, from the JSON

A benchmark is a module with ``OPTIONS`` and ``main(argv)``.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring.command import command_parser
from measuring.results import table, write_results

Row = dict[str, Any]
Options = Mapping[str, tuple[Any, ...]]
"""By name: the default, what it is, and, if only some values are allowed, these."""


def parse(description: str | None, options: Options, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a benchmark: its options, and ``--output``.

    An option has the type of its default; a list takes one value or more.
    """
    parser = command_parser(description)
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
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    return parser.parse_args(argv)


def publish(
    benchmark: str, args: argparse.Namespace, rows: list[Row], argv: Sequence[str] | None, **more: Any
) -> None:
    """Prints the table of ``rows``; with ``--output`` writes the JSON file.

    ``argv`` is what ``args`` was parsed from; ``more`` goes into the file too.
    """
    words = ["python", "-m", f"benchmarks.{benchmark}", *(sys.argv[1:] if argv is None else argv)]
    if args.output:
        arguments = {name: value for name, value in vars(args).items() if name != "output"}
        about = {"benchmark": benchmark, "command": shlex.join(words), "arguments": arguments}
        write_results(args.output, **about, rows=rows, **more)
    show(rows)


def show(rows: Sequence[Row]) -> None:
    """Prints the table of ``rows``, or one for each value of "part"."""
    for part in dict.fromkeys(row.get("part") for row in rows):
        print("\n" + table([row for row in rows if row.get("part") == part]), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Shows the results in a file."""
    parser = command_parser("Prints a benchmark's table again, from its JSON.")
    parser.add_argument("results", type=Path, help="JSON file that a benchmark has written")
    show(json.loads(parser.parse_args(argv).results.read_text(encoding="utf-8"))["rows"])


if __name__ == "__main__":
    main()
