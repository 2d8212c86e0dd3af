"""What a benchmark leaves: a JSON file, and a table and a plot that are made from it alone.

    python -m benchmarks.NAME --output NAME.json    # measures, prints a table; writes NAME.json, NAME.svg
    python -m benchmarks.results NAME.json          # table and plot again, from the JSON

A benchmark is a module with ``table(results)``, which returns Markdown, and ``draw(results)``, which
returns a matplotlib figure; ``results`` is what ``collect`` returns, read back from JSON.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("torch", "deepspeed", "ds_interlock", "numpy")


def collect(
    benchmark: str,
    arguments: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The results of one run: where, with what and how it was measured, and ``rows``, the measurements.

    Args:
        benchmark: Name of the module in ``benchmarks``.
        arguments: Its command line as parsed, defaults included.
        rows: One dictionary for each line of the table, of what JSON can hold.
        argv: Its command line as given; None for that of this process.
    """
    results = {
        "benchmark": benchmark,
        "command": shlex.join(
            ["python", "-m", f"benchmarks.{benchmark}", *(sys.argv[1:] if argv is None else argv)]
        ),
        "arguments": {name: value for name, value in vars(arguments).items() if name != "output"},
        "machine": machine(),
        "versions": versions(),
        "rows": list(rows),
    }
    # As it will be read from the file: keys are strings, tuples lists.
    read: dict[str, Any] = json.loads(json.dumps(results))
    return read


def machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system and, where there is one, GPU."""
    import torch

    return {
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that what is measured depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            found[package] = getattr(import_module(package), "__version__", "unknown")
    return found


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds ``--output``, which every benchmark has."""
    parser.add_argument("--output", type=Path, help="write the results to this JSON file, a plot beside it")


def add_choice(parser: argparse.ArgumentParser, option: str, names: Sequence[str], meaning: str) -> None:
    """Adds ``option``, which takes some of ``names``; by default all."""
    listed = ", ".join(f'"{name}"' for name in names)
    parser.add_argument(
        option,
        nargs="+",
        choices=names,
        default=list(names),
        metavar="NAME",
        help=f"{meaning}: {listed} (all)",
    )


def publish(results: dict[str, Any], output: Path | None) -> None:
    """Prints the table; with ``output`` writes the JSON file and beside it the plot."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results, output)


def show(results: dict[str, Any], output: Path | None) -> None:
    """Prints the table of ``results``; with ``output`` writes the plot as an SVG beside it."""
    benchmark = import_module(f"benchmarks.{results['benchmark']}")
    print("\n" + benchmark.table(results), flush=True)
    if output:
        benchmark.draw(results).savefig(output.with_suffix(".svg"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats with three digits that count, None as an empty cell."""
    lines = [_line(header), _line(["---"] * len(header))]
    return "\n".join([*lines, *(_line([_cell(value) for value in row]) for row in rows)])


def new_figure(num_columns: int, title: str, *, num_rows: int = 1) -> tuple[Any, Any]:
    """A figure of ``num_columns`` plots side by side, drawn without a display.

    Returns:
        The figure, and an array [num_rows, num_columns] of its axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * num_columns + 2, 4 * num_rows), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def add_legend(figure: Any, axis: Any) -> None:
    """Says beside the plots what the labels of ``axis`` mean, on the right."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def _processor() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> None:
    """Shows the results in a file."""
    parser = argparse.ArgumentParser(
        description="Prints the table of a benchmark and redraws its plot, from its JSON."
    )
    parser.add_argument("results", type=Path, help="JSON file that a benchmark has written")
    args = parser.parse_args(argv)
    show(json.loads(args.results.read_text(encoding="utf-8")), args.results)


if __name__ == "__main__":
    main()
