"""Numbers as the report's tables show them: means and sample standard deviations over the seeds."""

from experiments.comparison import Spread
from experiments.efficiency import Efficiency

NOTHING = "–"


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


def steps_to_target(efficiency: Efficiency, mode: str) -> str:
    """Steps to global's loss, or that it is not reached."""
    steps = efficiency.steps(mode)
    reached = Spread.of(steps)
    if reached or not steps:
        return cell(reached, 0)
    end = max(result.run.num_steps for result in efficiency.comparison.results[mode].values())
    some = f" ({sum(step is not None for step in steps)} of {len(steps)} seeds do)" if any(steps) else ""
    return f"not in {end:,} steps{some}"
