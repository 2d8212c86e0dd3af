"""The pictures of an experiment, from its results: the same results make the same files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from experiments.comparison import Comparison
from experiments.definition import GLOBAL, LOCAL

_NUM_COLUMNS = 4

Floats = NDArray[np.float64]


def save(figure: Figure, path: Path) -> None:
    """Writes an SVG in which nothing depends on when and in which process it is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "ds_interlock"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def curves(comparison: Comparison) -> Figure:
    """Validation loss against steps: mean over the seeds, in a band from the lowest to the highest.

    On the left whole curves; on the right the second half of the budget and what follows, between the
    best mode and the worse of global and local.
    """
    figure = _new_figure(12, 4, f"{comparison.name}: validation loss")
    whole, close = figure.subplots(1, 2)
    half = comparison.budget / 2
    losses = {mode: _over_seeds(comparison, mode, "loss") for mode in comparison.results}
    late = {mode: losses_st[:, steps >= half] for mode, (steps, losses_st) in losses.items()}
    lowest = min(losses_st.min() for losses_st in late.values())
    highest = max(losses_st.max() for mode, losses_st in late.items() if mode in (GLOBAL, LOCAL))
    for axis in (whole, close):
        for number, (mode, (steps, losses_st)) in enumerate(losses.items()):
            color, style = f"C{number % 10}", "-" if number < 10 else "--"
            axis.plot(steps, losses_st.mean(axis=0), label=mode, color=color, linestyle=style)
            axis.fill_between(steps, losses_st.min(0), losses_st.max(0), color=color, alpha=0.2, lw=0)
        axis.set_xlabel("steps")
        axis.axvline(comparison.budget, color="grey", linestyle=":")
    margin = 0.05 * (highest - lowest)
    whole.set_ylabel("nats")
    close.set(xlim=(half, None), ylim=(lowest - margin, highest + margin))
    return _with_legend(figure, whole)


def stage_rms(comparison: Comparison) -> Figure:
    """Root mean square of each stage's output but the last's, over training; a panel for each mode."""
    return _panels(comparison, "stage_rms", "RMS of each stage's output")


def cosines(comparison: Comparison) -> Figure:
    """Cosine of each stage's gradient with the global gradient, over training; a panel for each mode."""
    return _panels(comparison, "cosine", "cosine with the global gradient")


def modes_with(comparison: Comparison, key: str) -> list[str]:
    """The modes in which all seeds have ``key`` at some step."""
    return [mode for mode in comparison.results if len(_over_seeds(comparison, mode, key)[0])]


def _new_figure(width: float, height: float, title: str) -> Figure:
    """A figure of so many inches that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _with_legend(figure: Figure, axis: Any) -> Figure:
    """Puts a legend of ``axis`` on the right, beside all plots."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    return figure


def _over_seeds(comparison: Comparison, mode: str, key: str) -> tuple[Floats, Floats]:
    """The steps at which all seeds have ``key``; its values [seed, step] or [seed, step, stage], or nan."""
    series = [result.series(key) for result in comparison.results[mode].values()]
    steps = sorted(set.intersection(*map(set, series)))
    values = np.array([[of_seed[step] for step in steps] for of_seed in series], dtype=float)
    return np.array(steps, dtype=float), values


def _panels(comparison: Comparison, key: str, title: str) -> Figure:
    """A panel for each mode that has ``key``, a line for each stage, all in the same limits."""
    modes = modes_with(comparison, key)
    num_rows = math.ceil(len(modes) / _NUM_COLUMNS)
    inches = (2.6 * _NUM_COLUMNS + 1, 2.2 * num_rows + 0.6)
    figure = _new_figure(*inches, f"{comparison.name}: {title}")
    axes = figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False)
    used = axes.flat[: len(modes)]
    for axis, mode in zip(used, modes, strict=True):
        if key == "stage_rms":
            axis.set_yscale("log")
            # Plain numbers, also between the powers of 10 where these are few.
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())
        _draw_stages(axis, *_over_seeds(comparison, mode, key))
        axis.set_title(mode, fontsize="small")
    for axis in axes.flat[len(modes) :]:
        axis.remove()
    limits = np.array([axis.get_ylim() for axis in used])
    for axis in used:
        axis.set_ylim(limits.min(), limits.max())
    return _with_legend(figure, axes.flat[0])


def _draw_stages(axis: Any, steps: Floats, values_stk: Floats) -> None:
    """A line for each stage: the mean over the seeds that have a number."""
    num_stages = values_stk.shape[-1]
    known_stk = np.ma.masked_invalid(values_stk)
    for stage in range(num_stages):
        color = colormaps["viridis"](stage / max(1, num_stages - 1))
        axis.plot(steps, known_stk[..., stage].mean(axis=0), color=color, label=f"stage {stage}")
    axis.tick_params(which="both", labelsize="x-small")
