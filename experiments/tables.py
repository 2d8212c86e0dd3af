"""The tables of the report: means and sample standard deviations over the seeds."""

import math
from collections.abc import Callable, Iterable
from functools import partial

from experiments.comparison import Comparison, Result, Spread
from experiments.definition import GLOBAL, LOCAL
from experiments.efficiency import Efficiency
from measuring.results import markdown

NOTHING = "–"

_WINDOWS = ("window 2", "window 3")
"""The modes in the summary's columns on quality."""
_MICRO_BATCHES = (1, 4)
"""Per batch, in the summary's columns on time."""

_TEXT_COLUMNS: list[tuple[str, Callable[[Result], float], int]] = [  # title, value, decimals
    ("validation perplexity", lambda result: math.exp(result.final["loss"]), 3),
    ("validation loss", lambda result: result.final["loss"], 3),
]


def cell(spread: Spread | None, digits: int, *, signed: bool = False) -> str:
    """``1.23 ± 0.04``; of a single seed the number alone; a dash for nothing."""
    if spread is None:
        return NOTHING
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.{digits}f}"
    return f"{spread.mean:{'+' if signed else ''}.{digits}f}{deviation}"


def percent(spread: Spread | None) -> str:
    """A share as ``75 ± 4 %``."""
    if spread is None:
        return NOTHING
    return f"{cell(Spread(tuple(100 * value for value in spread.values)), 0)} %"


def digits_of(comparison: Comparison) -> int:
    """Decimals of a quality: of an error in % two, of a loss three."""
    return 2 if comparison.is_images else 3


def unit_of(comparison: Comparison) -> str:
    """Of a difference of qualities."""
    return "points" if comparison.is_images else "nats"


def summary(experiments: Iterable[tuple[Comparison, Efficiency | None]]) -> str:
    """A row for each experiment: the claims on quality and on time."""
    header = ["experiment", "window 2 minus local", "in standard deviations"]
    header += [f"gap recovered by {mode}" for mode in _WINDOWS]
    header += [f"best time-to-loss speed-up, M = {m}" for m in _MICRO_BATCHES]
    return markdown(header, [_summary_row(*experiment) for experiment in experiments])


def _summary_row(runs: Comparison, efficiency: Efficiency | None) -> list[str]:
    gain = runs.gain_over_local(_WINDOWS[0])
    return [
        runs.name,
        f"{cell(gain, digits_of(runs), signed=True)} {unit_of(runs)}" if gain else NOTHING,
        f"{gain.mean / gain.deviation:+.1f}" if gain and gain.deviation else NOTHING,
        *(percent(runs.recovered(mode)) for mode in _WINDOWS),
        *(_best(efficiency, m) for m in _MICRO_BATCHES),
    ]


def _best(efficiency: Efficiency | None, num_micro_batches: int) -> str:
    """The mode that reaches global's loss first, of those with windows."""
    if efficiency is None or num_micro_batches not in efficiency.micro_batches:
        return "not measured"
    modes = [mode for mode in efficiency.modes if not efficiency.comparison.is_global(mode)]
    gains = {mode: efficiency.speed_up(mode, num_micro_batches) for mode in modes}
    reached = {mode: gain for mode, gain in gains.items() if gain}
    if not reached:
        return "none gets there"
    mode = max(reached, key=lambda name: reached[name].mean)
    return f"{cell(reached[mode], 2)} ({mode})"


def quality(comparison: Comparison) -> str:
    """How good each mode is at the end of the budget, and how much of local's gap to global it closes."""
    images = [("test error, %", comparison.quality, 2), ("test loss", lambda one: one.final["loss"], 3)]
    columns = images if comparison.is_images else _TEXT_COLUMNS
    rows = []
    for mode in comparison.modes:
        scores = [cell(comparison.spread(mode, measure), digits) for _, measure, digits in columns]
        gain = None if mode == LOCAL else comparison.gain_over_local(mode)
        share = None if mode in (LOCAL, GLOBAL) else comparison.recovered(mode)
        gained = cell(gain, digits_of(comparison), signed=True)
        rows.append([mode, *scores, gained, percent(share), len(comparison.results[mode])])
    header = ["mode", *(title for title, _, _ in columns), f"minus local, {unit_of(comparison)}"]
    return markdown([*header, "gap recovered", "seeds"], rows)


def stage_rms(comparison: Comparison) -> str:
    """Root mean square of the stages' outputs at the end of the budget, beside global's."""
    rows = []
    for mode in comparison.modes:
        first = comparison.spread(mode, lambda one: one.at_the_end("stage_rms")[0])
        ratios = None if mode == GLOBAL else _stage_ratios(comparison, mode)
        # The stage whose ratio is the largest on average, so that the deviation is that of one stage.
        stage, largest = max(enumerate(ratios), key=lambda pair: pair[1].mean) if ratios else (NOTHING, None)
        rows.append([mode, cell(first, 2), cell(largest, 2), stage])
    header = ["mode", "RMS after the first stage", "largest ratio to global's", "after stage"]
    return markdown(header, rows)


def cosines(comparison: Comparison) -> str:
    """Each stage's cosine with the global gradient, at its last measurement within the budget."""
    rows = []
    for mode in comparison.modes:
        by_seed = [result.at_the_end("cosine") for result in comparison.results[mode].values()]
        if None not in by_seed:
            rows.append([mode, *(cell(Spread.of(of_stage), 2) for of_stage in zip(*by_seed, strict=True))])
    num_stages = comparison.reference.run.num_stages
    return markdown(["mode", *(f"stage {stage}" for stage in range(num_stages))], rows)


def speed_up(efficiency: Efficiency) -> str:
    """How much faster than global each mode reaches global's loss."""
    numbers = efficiency.micro_batches
    rows = []
    for mode in efficiency.modes:
        speeds = [" → ".join(f"{speed:.2f}" for speed in efficiency.batch_speeds(mode, m)) for m in numbers]
        gains = [cell(efficiency.speed_up(mode, m), 2) for m in numbers]
        rows.append([mode, _steps(efficiency, mode), *speeds, *gains])
    header = ["mode", "steps to global's loss", *(f"speed of a batch, M = {m}" for m in numbers)]
    return markdown([*header, *(f"time-to-loss speed-up, M = {m}" for m in numbers)], rows)


def equal_time(efficiency: Efficiency) -> str:
    """The loss of each mode when the time of global's budget is over."""
    numbers = efficiency.micro_batches
    rows = [
        [mode, *(_bound(*efficiency.at_equal_time(mode, m)) for m in numbers)] for mode in efficiency.modes
    ]
    return markdown(["mode", *(f"M = {m}" for m in numbers)], rows)


def _stage_ratios(comparison: Comparison, mode: str) -> list[Spread] | None:
    """For each stage but the last the RMS of its output over that of global, seed by seed."""

    def ratio(stage: int, one: Result, reference: Result) -> float:
        return float(one.at_the_end("stage_rms")[stage] / reference.at_the_end("stage_rms")[stage])

    stages = range(comparison.reference.run.num_stages - 1)
    ratios = [comparison.paired([mode, GLOBAL], partial(ratio, stage)) for stage in stages]
    return None if None in ratios else [spread for spread in ratios if spread]


def _steps(efficiency: Efficiency, mode: str) -> str:
    """Steps to the target, or that it is not reached."""
    steps = efficiency.steps(mode)
    reached = Spread.of(steps)
    if reached:
        return cell(reached, 0)
    if not steps:
        return NOTHING
    end = max(result.run.num_steps for result in efficiency.comparison.results[mode].values())
    some = f" ({sum(step is not None for step in steps)} of {len(steps)} seeds do)" if any(steps) else ""
    return f"not in {end:,} steps{some}"


def _bound(loss: Spread, is_bound: bool) -> str:
    return ("≤ " if is_bound else "") + cell(loss, 3)
