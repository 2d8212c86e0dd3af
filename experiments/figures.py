"""The pictures of an experiment, from its results: the same results make the same files."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray

from experiments.comparison import Comparison
from experiments.definition import GLOBAL, LOCAL
from measuring.results import add_legend, new_figure

_NUM_COLUMNS = 4
_PANEL_INCHES = (2.6, 2.2)

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
    figure, axes = new_figure(2, f"{comparison.name}: validation loss")
    whole, close = axes[0]
    for number, mode in enumerate(comparison.modes):
        steps, losses_st = over_seeds(comparison, mode, "loss")
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        for axis in (whole, close):
            axis.plot(steps, losses_st.mean(axis=0), label=mode, **style)
            axis.fill_between(
                steps, losses_st.min(axis=0), losses_st.max(axis=0), color=style["color"], alpha=0.2, lw=0
            )
            axis.set_xlabel("steps")
    for axis in (whole, close):
        axis.axvline(comparison.budget, color="grey", linestyle=":")
    whole.set_ylabel("nats")
    close.set(xlim=(comparison.budget / 2, None), ylim=zoom(comparison))
    add_legend(figure, whole)
    return figure


def zoom(comparison: Comparison) -> tuple[float, float]:
    """Losses between which global and local lie in the second half of the budget, and the best mode."""
    lowest, highest = math.inf, -math.inf
    for mode in comparison.modes:
        steps, losses_st = over_seeds(comparison, mode, "loss")
        late_st = losses_st[:, steps >= comparison.budget / 2]
        lowest = min(lowest, late_st.min())
        if mode in (GLOBAL, LOCAL):
            highest = max(highest, late_st.max())
    margin = 0.05 * (highest - lowest)
    return lowest - margin, highest + margin


def stage_rms(comparison: Comparison) -> Figure:
    """Root mean square of each stage's output but the last's, over training; a panel for each mode."""
    return _panels(comparison, "stage_rms", "RMS of each stage's output", _use_log_scale)


def cosines(comparison: Comparison) -> Figure:
    """Cosine of each stage's gradient with the global gradient, over training; a panel for each mode."""
    return _panels(comparison, "cosine", "cosine with the global gradient", lambda axis: None)


def modes_with(comparison: Comparison, key: str) -> list[str]:
    """The modes in which all seeds have ``key`` at some step."""
    return [mode for mode in comparison.modes if len(over_seeds(comparison, mode, key)[0])]


def over_seeds(comparison: Comparison, mode: str, key: str) -> tuple[Floats, Floats]:
    """The values of ``key`` in the points of a mode's curves.

    Returns:
        The steps at which all seeds have it; the values [seed, step], or [seed, step, stage], nan where
        a file has null.
    """
    series = [result.series(key) for result in comparison.results[mode].values()]
    steps = sorted(set.intersection(*(set(of_seed) for of_seed in series)))
    values = np.array([[of_seed[step] for step in steps] for of_seed in series], dtype=float)
    return np.array(steps, dtype=float), values


def _panels(comparison: Comparison, key: str, title: str, prepare: Callable[[Any], None]) -> Figure:
    """A panel for each mode that has ``key``, a line for each stage, all in the same limits."""
    shown = modes_with(comparison, key)
    num_rows = math.ceil(len(shown) / _NUM_COLUMNS)
    figure, axes = new_figure(_NUM_COLUMNS, f"{comparison.name}: {title}", num_rows=num_rows)
    figure.set_size_inches(_PANEL_INCHES[0] * _NUM_COLUMNS + 1, _PANEL_INCHES[1] * num_rows + 0.6)
    for axis, mode in zip(axes.flat, shown, strict=False):
        prepare(axis)
        _draw_stages(axis, *over_seeds(comparison, mode, key))
        axis.set_title(mode, fontsize="small")
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    _share_limits(axes.flat[: len(shown)])
    add_legend(figure, axes.flat[0])
    return figure


def _draw_stages(axis: Any, steps: Floats, values_stk: Floats) -> None:
    """A line for each stage: the mean over the seeds that have a number."""
    num_stages = values_stk.shape[-1]
    known_stk = np.ma.masked_invalid(values_stk)
    for stage in range(num_stages):
        color = colormaps["viridis"](stage / max(1, num_stages - 1))
        axis.plot(steps, known_stk[..., stage].mean(axis=0), color=color, label=f"stage {stage}")
    axis.tick_params(which="both", labelsize="x-small")


def _use_log_scale(axis: Any) -> None:
    """With plain numbers, also between the powers of 10 where these are few."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter())


def _share_limits(axes: Any) -> None:
    limits = [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
