"""An honest verdict: which setting is fastest among those worth their speed, and whether interlocking pays.

What was measured to learn no better than local is not recommended, however fast it is.
"""

from ds_interlock.planning.forecast import ZERO_BUBBLE, Comparison, Forecast

_WORTHWHILE = 1.05  # a smaller gain is within what a prediction is worth: inexact gradients do not pay
_DEAR_HEADS = 0.15  # a share of the work from which cheaper heads are worth a word


def best_interlock(comparison: Comparison) -> Forecast | None:
    """The fastest setting whose stages still talk to each other; None if no setting does.

    Settings that learned better than local come first, then those that were not measured.
    """
    interlocking = [each for each in comparison.all if _interlocks(each)]
    better = [each for each in interlocking if each.beats_local]
    not_measured = [each for each in interlocking if each.beats_local is None]
    return max(better or not_measured, key=lambda each: each.speed, default=None)


def pays(comparison: Comparison) -> bool:
    """True if some interlocking setting is worth its inexact gradients: 5 % faster than global or more."""
    best = best_interlock(comparison)
    return best is not None and best.speed >= _WORTHWHILE


def verdict(comparison: Comparison) -> str:
    """Says what is fastest, whether interlocking pays, and what the configured setting is worth.

    Local learning is named where it is fastest, but it never counts as interlocking: no loss crosses
    a stage's border there.
    """
    m, k = comparison.num_micro_batches, comparison.reference.plan.num_stages
    where = f"{m} micro-batch{'es' * (m > 1)} on {k} stage{'s' * (k > 1)}"
    best = best_interlock(comparison)
    others = [each for each in comparison.all if not each.is_reference and not _interlocks(each)]
    fastest = max([best, *others] if best else others, key=lambda each: each.speed)
    if best is None:
        text = f"With {where} there is nothing to interlock: fastest is {_named(fastest)}"
    elif pays(comparison):
        text = f"Interlocking pays with {where}: {_named(best)}"
        if fastest is not best:
            text += f"; only {_named(fastest)} is faster, with gradients that stop at every border"
    elif best.speed >= 1:
        text = f"Interlocking hardly pays with {where}: {_named(best)}"
        text += ", too small a gain for inexact gradients"
    else:
        text = f"Interlocking does not pay with {where}: its fastest setting, {_named(best)}, is slower"
        text += " than global, whose gradients are exact besides"
    remarks = (_about_quality, _about_zero_bubble, _about_heads, _about_copies, _about_configured)
    return "".join([text, *(remark(comparison, best) for remark in remarks), "."])


def _interlocks(each: Forecast) -> bool:
    """Whether losses cross stages' borders, but not all of them."""
    return 1 < each.window < each.plan.num_stages


def _named(each: Forecast) -> str:
    return f"{each.name} ({each.speed:.2f} times the speed of global)"


def _about_quality(comparison: Comparison, best: Forecast | None) -> str:
    if best is None or best.speed < 1:
        return ""
    if best.gap_recovered is None:
        return f". How well {best.name} learns was not measured"
    made_up = f"made up for {best.gap_recovered:.0%} of what local loses"
    return f". {best.name.capitalize()} {made_up} in our experiment {best.measured_in}"


def _about_zero_bubble(comparison: Comparison, best: Forecast | None) -> str:
    """Global gradients without most of the bubble are the better bargain where they are as fast."""
    line = next(each for each in comparison.others if each.name == ZERO_BUBBLE)
    if best is None or line.speed < best.speed:
        return ""
    return f". A zero-bubble schedule (ZB-H1, which DeepSpeed does not have) would do {line.speed:.2f} times"


def _about_heads(comparison: Comparison, best: Forecast | None) -> str:
    dearest = max((each.head_share for each in (best, comparison.configured) if each), default=0.0)
    if dearest < _DEAR_HEADS:
        return ""
    return (
        f". Auxiliary heads are {dearest:.0%} of the work: lower interlock.head.token_fraction (with blocks "
        "sequence_fraction), or choose a cheaper interlock.head.type"
    )


def _about_copies(comparison: Comparison, best: Forecast | None) -> str:
    configured = comparison.configured
    if configured.refresh_every >= configured.refresh_at_least:
        return ""
    return (
        f". With interlock.head.refresh_every {configured.refresh_every} the configured setting waits for "
        f"copies of the unembedding: set it to {configured.refresh_at_least} or more"
    )


def _about_configured(comparison: Comparison, best: Forecast | None) -> str:
    configured = comparison.configured
    if configured.name in {comparison.reference.name, best.name if best else ""}:
        return ""
    is_no_better = _interlocks(configured) and configured.beats_local is False
    worse = (
        f", and learned no better than local in our experiment {configured.measured_in}"
        if is_no_better
        else ""
    )
    if f"{configured.speed:.2f}" == "1.00":
        return f". The configured setting, {configured.name}, is as fast as global{worse}"
    return f". The configured setting, {configured.name}, has {configured.speed:.2f} times its speed{worse}"
