"""The tables of the report: a row for each mode, mean and sample standard deviation over the seeds."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.results import markdown
from experiments.comparison import LOCAL, Comparison, Result, Spread
from experiments.definition import GLOBAL
from experiments.efficiency import Efficiency, EqualTime

NOTHING = "–"

Column = tuple[str, Callable[[Result], float], int]
"""Title, what it holds, decimals."""

_TEXT_COLUMNS: list[Column] = [
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


def quality(comparison: Comparison) -> str:
    """How good each mode is at the end of the budget, and how much of local's gap to global it closes."""
    columns = _image_columns(comparison) if comparison.is_images else _TEXT_COLUMNS
    rows = []
    for mode in comparison.modes:
        found = [cell(comparison.spread(mode, measure), digits) for _, measure, digits in columns]
        gain = _unless(mode, (LOCAL,), comparison.gain_over_local(mode))
        share = _unless(mode, (LOCAL, GLOBAL), comparison.recovered(mode))
        gained = cell(gain, digits_of(comparison), signed=True)
        rows.append([mode, *found, gained, percent(share), len(comparison.results[mode])])
    header = ["mode", *(title for title, _, _ in columns), f"minus local, {unit_of(comparison)}"]
    return markdown([*header, "gap recovered", "seeds"], rows)


def stage_rms(comparison: Comparison) -> str:
    """How loud the stages are at the end of the budget, beside global's."""
    rows = []
    for mode in comparison.modes:
        first = comparison.spread(mode, lambda one: one.at_the_end("stage_rms")[0])
        ratios = None if mode == GLOBAL else _stage_ratios(comparison, mode)
        # The stage whose ratio is the largest on average, so that the spread is that of one stage.
        stage, loudest = max(enumerate(ratios), key=lambda pair: pair[1].mean) if ratios else (NOTHING, None)
        rows.append([mode, cell(first, 2), cell(loudest, 2), stage])
    header = ["mode", "RMS after the first stage", "largest ratio to global's", "after stage"]
    return markdown(header, rows)


def cosines(comparison: Comparison) -> str:
    """Each stage's cosine with the global gradient, at its last measurement within the budget."""
    rows = []
    for mode in comparison.modes:
        found = [result.at_the_end("cosine") for result in comparison.results[mode].values()]
        if None not in found:
            rows.append([mode, *(cell(Spread.of(of_stage), 2) for of_stage in zip(*found, strict=True))])
    num_stages = comparison.reference.run.num_stages
    return markdown(["mode", *(f"stage {stage}" for stage in range(num_stages))], rows)


def speed_up(efficiency: Efficiency) -> str:
    """How much sooner than global each mode is at global's loss."""
    numbers = efficiency.micro_batches
    rows = []
    for mode in efficiency.modes:
        speeds = [_speeds(efficiency.batch_speeds(mode, m)) for m in numbers]
        gains = [cell(efficiency.speed_up(mode, m), 2) for m in numbers]
        rows.append([mode, _steps(efficiency, mode), *speeds, *gains])
    header = ["mode", "steps to global's loss", *(f"speed of a batch, M = {m}" for m in numbers)]
    return markdown([*header, *(f"time-to-loss speed-up, M = {m}" for m in numbers)], rows)


def equal_time(efficiency: Efficiency) -> str:
    """The loss of each mode when the time of global's budget is over."""
    numbers = efficiency.micro_batches
    rows = [
        [mode, *(_bound(efficiency.at_equal_time(mode, m)) for m in numbers)] for mode in efficiency.modes
    ]
    return markdown(["mode", *(f"M = {m}" for m in numbers)], rows)


def _image_columns(comparison: Comparison) -> list[Column]:
    return [
        ("test error, %", comparison.quality, 2),
        ("test loss", lambda result: result.final["loss"], 3),
    ]


def _unless(mode: str, excluded: Sequence[str], spread: Spread | None) -> Spread | None:
    """Nothing for a mode that would be compared with itself."""
    return None if mode in excluded else spread


def _stage_ratios(comparison: Comparison, mode: str) -> list[Spread] | None:
    """For each stage but the last the RMS of its output over that of global, seed by seed."""

    def ratio(stage: int, one: Result, reference: Result) -> float:
        found: float = one.at_the_end("stage_rms")[stage] / reference.at_the_end("stage_rms")[stage]
        return found

    stages = range(comparison.reference.run.num_stages - 1)
    found = [comparison.paired([mode, GLOBAL], partial(ratio, stage)) for stage in stages]
    return None if None in found else [spread for spread in found if spread]


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


def _speeds(speeds: Sequence[float]) -> str:
    """One for each phase, in their order."""
    return " → ".join(f"{speed:.2f}" for speed in speeds)


def _bound(found: EqualTime) -> str:
    return ("≤ " if found.is_bound else "") + cell(found.loss, 3)
