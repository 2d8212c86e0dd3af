"""What measurements are published with: machine and versions, Markdown tables."""

import importlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from ds_interlock.files import replace_text

_PACKAGES = ("torch", "deepspeed", "ds_interlock", "numpy")


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
    installed = {package: _version(package) for package in packages}
    return {"python": platform.python_version(), **installed}


def _version(package: str) -> str:
    """Of an installed package, or of one that is imported from its source."""
    try:
        return version(package)
    except PackageNotFoundError:
        return str(importlib.import_module(package).__version__)


def write_results(path: Path, **contents: Any) -> None:
    """Writes ``contents`` as JSON, with machine and versions; an interrupted write leaves an earlier file."""
    about = {"machine": machine(), "versions": versions()}
    replace_text(path, json.dumps(about | contents, indent=1) + "\n")


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats with three significant digits, None as an empty cell."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of ``rows`` with a column for each of their keys; missing values are empty."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return markdown(keys, [[row.get(key) for key in keys] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
