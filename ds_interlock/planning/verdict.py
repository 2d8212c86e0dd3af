"""An honest verdict: which setting reaches global's loss first, and whether interlocking pays.

A faster batch is worth what a step is worth. How many steps a setting needs is known from our experiments
(``quality.py``); what was measured to learn no better than local is not recommended, however fast it is.
"""

import math
from collections.abc import Callable

from ds_interlock.config import InterlockConfig
from ds_interlock.planning.forecast import ZERO_BUBBLE, Comparison, Forecast, ScheduleForecast
from ds_interlock.planning.quality import Measurement, elsewhere, setting_of

_WORTHWHILE = 1.05  # a smaller gain is within what a prediction is worth: inexact gradients do not pay
_WHOLE = 0.97  # a share of the gap from which a setting learns as well as global
_DEAR_HEADS = 0.15  # a share of the work from which cheaper heads are worth a word


def worth(each: Forecast | ScheduleForecast) -> float:
    """How many times as fast as global a setting gets to global's loss, as far as that is known.

    Where it did not get there in its budget, the gain in speed counts by the share of the gap that it closed,
    and no more than the steps that it had allow. Where nothing was measured the speed is all there is.
    """
    if each.speed_to_loss is not None:
        return each.speed_to_loss
    assert isinstance(each, Forecast)
    if each.measured is None:
        return each.speed
    by_share = 1.0 + (each.speed - 1.0) * each.measured.share.mean
    return min(by_share, each.speed / each.measured.most_steps)


def best_interlock(comparison: Comparison) -> Forecast | None:
    """The best setting whose stages still talk to each other; None if no setting does.

    Settings that reached global's loss come first, then others that learned better than local, then those
    that were not measured. What learned no better than local is none of them.
    """
    candidates = [each for each in comparison.all if _interlocks(each) and each.beats_local is not False]
    better = [each for each in candidates if each.beats_local]
    reached = [each for each in better if each.speed_to_loss]
    return max(reached or better or candidates, key=worth, default=None)


def best_schedule(comparison: Comparison, least_share: float = -math.inf) -> ScheduleForecast | None:
    """The measured schedule that gets to global's loss first, of those that closed so much of the gap."""
    known = (each for each in comparison.schedules if each.gap_recovered >= least_share)
    return max(known, key=worth, default=None)


def pays(comparison: Comparison) -> bool:
    """True if a setting that interlocks, or a schedule, is worth its inexact gradients: by 5 % or more."""
    choices = (best_interlock(comparison), best_schedule(comparison))
    return any(worth(each) >= _WORTHWHILE for each in choices if each)


def verdict(comparison: Comparison) -> str:
    """Says what reaches global's loss first, whether interlocking pays, what the configured setting is worth.

    Local learning never counts as interlocking: no loss crosses a stage's border there.
    """
    m, k = comparison.num_micro_batches, comparison.reference.plan.num_stages
    where = f"{m} micro-batch{'es' * (m > 1)} on {k} stage{'s' * (k > 1)}"
    best = best_interlock(comparison)
    if best is None:
        others = [each for each in comparison.all if not each.is_reference and not _interlocks(each)]
        choice = max([comparison.reference, *others], key=worth)
        text = f"With {where} there is nothing to interlock: the best choice is {_named(choice)}"
    elif worth(best) >= _WORTHWHILE:
        text = f"Interlocking pays with {where}: {_named(best)}"
    elif (schedule := best_schedule(comparison)) and worth(schedule) >= _WORTHWHILE:
        text = f"Interlocking pays with {where} as a schedule: {_named_schedule(schedule)}"
    elif worth(best) >= 1:
        text = f"Interlocking hardly pays with {where}: {_named(best)}"
        text += ", too small a gain for inexact gradients"
    else:
        text = f"Interlocking does not pay with {where}: its best setting, {_named(best)}, gains nothing over"
        text += " global, whose gradients are exact besides"
    return "".join([text, *(remark(comparison, best) for remark in _REMARKS), "."])


def _interlocks(each: Forecast) -> bool:
    """Whether losses cross stages' borders, but not all of them."""
    return 1 < each.window < each.plan.num_stages


def _named(each: Forecast) -> str:
    if each.is_exact:
        return each.name
    speed = f"{each.speed:.2f} times the speed of global"
    if each.speed_to_loss is None:
        return f"{each.name} ({speed})"
    return f"{each.name} ({speed}, {each.speed_to_loss:.2f} times as fast to its loss)"


def _named_schedule(each: ScheduleForecast) -> str:
    starts = " and ".join(f"{start:.0%}" for start, _ in each.phases[1:])
    gain = f"{each.speed_to_loss:.2f} times as fast to its loss"
    return f"{each.name} (from {starts} of global's steps), {gain}"


def about_schedule(interlock: InterlockConfig, comparison: Comparison) -> str:
    """What is known of a configured schedule as a whole."""
    setting = setting_of(interlock)
    for each in comparison.schedules:
        if setting_of(each.measured.section) == setting:
            return (
                f"The schedule as a whole was measured in our experiment {each.measured.place}: "
                f"{_named_schedule(each)}, in {each.relative_steps:.2f} times its steps."
            )
    return "How well the schedule as a whole learns was not measured."


def _about_quality(comparison: Comparison, best: Forecast | None) -> str:
    if best is None:
        return ""
    if best.measured is None:
        return f". How well {best.name} learns with these heads was not measured"
    text = f". In our experiment {best.measured.place} {best.name} "
    text += f"{_made_up_for(best.measured)}, and "
    if best.measured.steps:
        return f"{text}took {best.measured.steps.mean:.2f} times global's steps to its loss"
    return f"{text}did not reach global's loss in {best.measured.most_steps:.3g} times its steps"


def _about_local(comparison: Comparison, best: Forecast | None) -> str:
    """What local learning would give, where its batches are faster."""
    best = best or comparison.reference
    faster = [
        each
        for each in comparison.all
        if each.window == 1 and (each.speed > best.speed or (each.speed_to_loss or 0.0) > worth(best))
    ]
    if not faster:
        return ""
    local = max(faster, key=lambda each: (each.speed_to_loss or 0.0, each.speed))
    if local.speed_to_loss:
        beats = local.speed_to_loss > worth(best)
        return f". {_capital(_named(local))} gets there {'first' if beats else 'later'}"
    fate = "how it learns was not measured"
    if local.measured:
        fate = f"it did not reach global's loss in {local.measured.most_steps:.3g} times its steps"
    return f". {_capital(_named(local))} is faster, with gradients that stop at every border: {fate}"


def _about_better_buys(comparison: Comparison, best: Forecast | None) -> str:
    """What gets to global's loss before every setting: a schedule of windows, or global without bubble."""
    schedule = best_schedule(comparison)
    exact = next(each for each in comparison.others if each.name == ZERO_BUBBLE)
    to_beat = max(worth(best) if best else 1.0, 1.0)
    local = max((each.speed_to_loss or 0.0 for each in comparison.all if each.window == 1), default=0.0)
    if schedule and worth(schedule) > max(to_beat, exact.speed, local) and to_beat >= _WORTHWHILE:
        return f". A schedule is the better buy: {_named_schedule(schedule)}"
    if exact.speed < (to_beat if best else _WORTHWHILE):
        return ""
    return (
        ". Exact gradients are the better buy under a zero-bubble schedule (ZB-H1, which DeepSpeed does not "
        f"have): {exact.speed:.2f} times the speed of global"
    )


def _about_end(comparison: Comparison, best: Forecast | None) -> str:
    """Which schedule learns as well as global, and is still faster, unless the best setting does as well."""
    if best and best.measured and best.measured.share.mean >= _WHOLE:
        return ""
    schedule = best_schedule(comparison, _WHOLE)
    if schedule is None or worth(schedule) < _WORTHWHILE:
        return ""
    closed = _made_up_for(schedule.measured)
    return f". If the loss at the end counts most, take {_named_schedule(schedule)}: it {closed}"


def _made_up_for(measured: Measurement) -> str:
    """The share of the gap that a setting closed, and the range of it in other experiments."""
    text = f"made up for {measured.share.mean:.0%} of what local loses"
    others = elsewhere(measured)
    if not others:
        return text
    shares = [each.share.mean for each in others]
    number = len({each.experiment for each in others})
    if number == 1:
        return f"{text} ({max(shares):.0%} in another)"
    return f"{text} ({min(shares):.0%} to {max(shares):.0%} in {number} others)"


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
    worse = ""
    if configured.beats_local is False:
        in_experiment = f" in our experiment {configured.measured.place}" if configured.measured else ""
        worse = f", and was measured to learn no better than local{in_experiment}"
    if f"{configured.speed:.2f}" == "1.00":
        return f". The configured setting, {configured.name}, is as fast as global{worse}"
    return f". The configured setting, {configured.name}, has {configured.speed:.2f} times its speed{worse}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


_Remark = Callable[[Comparison, Forecast | None], str]
_REMARKS: tuple[_Remark, ...] = (
    _about_quality,
    _about_local,
    _about_better_buys,
    _about_end,
    _about_heads,
    _about_copies,
    _about_configured,
)
