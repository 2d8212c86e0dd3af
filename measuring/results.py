"""What measurements are published with: machine and versions, Markdown tables, figures."""

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("torch", "deepspeed", "ds_interlock", "numpy")

Column = str | tuple[str, float] | Callable[[dict[str, Any]], Any]
"""Of a row: a key, a key and what to divide by, or a function of the row."""


def machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system and GPU (None without one)."""
    import torch

    return {
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that a measurement depends on."""
    of_packages = {"python": platform.python_version()}
    for package in packages:
        try:
            of_packages[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            of_packages[package] = getattr(import_module(package), "__version__", "unknown")
    return of_packages


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats with three significant digits, None as an empty cell."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table_of(rows: Iterable[dict[str, Any]], columns: Mapping[str, Column]) -> str:
    """A Markdown table of ``rows``, from the titles and contents of its columns; missing keys are empty."""
    return markdown(list(columns), [[_value(row, column) for column in columns.values()] for row in rows])


def new_figure(num_columns: int, title: str, *, num_rows: int = 1) -> tuple[Any, Any]:
    """A figure that needs no display, and an array [num_rows, num_columns] of its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * num_columns + 2, 4 * num_rows), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def add_legend(figure: Any, axis: Any) -> None:
    """Puts a legend of ``axis`` on the right, beside all plots."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")


def _value(row: dict[str, Any], column: Column) -> Any:
    if isinstance(column, str):
        return row.get(column)
    if isinstance(column, tuple):
        return row[column[0]] / column[1] if column[0] in row else None
    return column(row)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
