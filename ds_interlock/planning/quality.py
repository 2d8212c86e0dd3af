"""How well settings were measured to learn, so that none is recommended for its speed alone.

    docs/experiments/*.jsonl  ── python -m experiments.report ──►  measured.json  ──►  measurement(setting, K)

    share = (local - setting) / (local - global)      of the losses at the end of a budget; 1: as global
    steps = the setting's / global's                  until global's loss at the end of its budget

Local is the experiment's mode "local", whose heads have no blocks. An experiment counts only if local is
behind global in all its seeds. Where several measured a setting, the first in this order does: language
models before pictures, several seeds before one, the number of stages nearest to the user's, most seeds,
most settings (so that one experiment answers for most of them), the largest model, the longest budget, the
best share.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ds_interlock.config import HeadConfig, InterlockConfig
from ds_interlock.files import read_record

FILE = Path(__file__).with_name("measured.json")

_PLAIN = HeadConfig(type="norm_linear")
_LEARNING = {"learning_rate_scale", "warmup_steps", "warmup_learning_rate", "fused"}
"""Keys of heads by which measurements do not differ: each experiment has its own rates."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Spread(_Record):
    """A mean over seeds, and the sample standard deviation (None for a single seed)."""

    mean: float
    deviation: float | None = None


class Measurement(_Record):
    """What an experiment says of a setting."""

    experiment: str
    mode: str
    """What the experiment calls the setting."""
    model: str
    """In words."""
    is_language: bool
    model_size: int
    """Blocks times the square of the width."""
    num_stages: int
    budget: int
    """Global's steps."""
    seeds: tuple[int, ...]
    interlock: dict[str, Any]
    """The setting: an "interlock" section."""
    share: Spread
    steps: Spread | None
    """None if it did not get there in every seed."""
    most_steps: float
    """The steps that it had, over the budget."""
    local: str
    """The mode that is local with such heads, or without blocks if there is none."""
    gain: Spread | None
    """Loss (or test error) of that mode less the setting's; None for local."""

    @cached_property
    def section(self) -> InterlockConfig:
        """The setting, checked."""
        return InterlockConfig.from_deepspeed({"interlock": self.interlock})

    @property
    def phases(self) -> list[tuple[float, InterlockConfig]]:
        """Of a schedule: where each phase begins, over global's steps, and its setting."""
        return [(step / self.budget, section) for step, section in self.section.phases]

    @property
    def place(self) -> str:
        """The experiment in words."""
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}"
        return f'"{self.experiment}" ({self.model} in {self.num_stages} stages, {seeds})'


class Measurements(_Record):
    """The contents of ``measured.json``."""

    format: Literal[1] = 1
    measurements: tuple[Measurement, ...]


@cache
def _measurements(file: Path) -> dict[tuple[Any, ...], list[Measurement]]:
    """All measurements in ``file``, by ``setting_of``."""
    hint = "write it with `python -m experiments.report`"
    by_setting: dict[tuple[Any, ...], list[Measurement]] = {}
    for each in read_record(file, Measurements, what="file of measurements", hint=hint).measurements:
        by_setting.setdefault(setting_of(each.section), []).append(each)
    return by_setting


def _every() -> list[Measurement]:
    return [each for of_setting in _measurements(FILE).values() for each in of_setting]


def measurement(interlock: InterlockConfig, num_stages: int) -> Measurement | None:
    """What was measured of a setting, or a schedule, with its heads; None if nothing, and for global."""
    of_setting = _measurements(FILE).get(setting_of(interlock))
    return _first(of_setting, num_stages) if of_setting else None


def elsewhere(measured: Measurement) -> list[Measurement]:
    """The same setting in other experiments, on data of the same kind and with several seeds."""
    return [
        each
        for each in _measurements(FILE)[setting_of(measured.section)]
        if each.experiment != measured.experiment
        and each.is_language == measured.is_language
        and len(each.seeds) > 1
    ]


def schedules(num_stages: int) -> list[Measurement]:
    """For every schedule of windows, with heads of each kind, that reached global's loss, its measurement."""
    chosen = [
        _first(of_setting, num_stages)
        for of_setting in _measurements(FILE).values()
        if of_setting[0].section.schedule
    ]
    return [each for each in chosen if each.steps]


def beats_local(interlock: InterlockConfig, num_stages: int) -> bool | None:
    """Whether a setting learned better than local with such heads; None: not measured, local or global.

    Better is by more than the deviation over the seeds, or with a single seed by more than the largest
    deviation of any setting of such models (Transformers, ResNets). What was no better with plain heads is
    taken to be so with others until these are measured.
    """
    if interlock.is_global or (interlock.window or 1) == 1:
        return None
    if with_its_heads := measurement(interlock, num_stages):
        return _is_better(with_its_heads)
    plain = measurement(interlock.model_copy(update={"head": _PLAIN}), num_stages)
    return False if plain and _is_better(plain) is False else None


def _is_better(measured: Measurement) -> bool | None:
    """Than local; None for local itself."""
    if measured.gain is None:
        return None
    deviation = measured.gain.deviation
    if deviation is None:
        alike = [each.gain for each in _every() if each.gain and each.is_language == measured.is_language]
        deviation = max(each.deviation or 0.0 for each in alike)
    return measured.gain.mean > deviation


def setting_of(interlock: InterlockConfig) -> tuple[Any, ...]:
    """Equal for sections of which one measurement holds: windows by phase, combine, stride and heads.

    All fractions between two whole windows count as one: there were two layers in a stage.
    """
    windows = tuple(_window(section) for _, section in interlock.phases)
    if interlock.is_global:
        return windows
    combine = frozenset(section.combine for _, section in interlock.phases if not section.is_global)
    return *windows, combine, interlock.head_stride, heads_of(interlock)


def heads_of(interlock: InterlockConfig) -> frozenset[tuple[str, Any]]:
    """Equal for sections whose heads differ in how they learn at most."""
    head = interlock.head
    blocks = (head.blocks,) if isinstance(head.blocks, int) else head.blocks
    while len(blocks) > 1 and blocks[-1] == blocks[-2]:
        blocks = blocks[:-1]
    values = head.resolve(pretrained="kl" in head.objectives).model_dump(exclude=_LEARNING)
    return frozenset({**values, "blocks": blocks, "objective": (*head.objectives.items(),)}.items())


def _window(section: InterlockConfig) -> float:
    """Stages that a loss reaches back over; infinite for global."""
    window = math.inf if section.is_global else section.window or 1.0
    return window if math.isinf(window) or window == int(window) else int(window) + 0.5


def _first(measurements: Sequence[Measurement], num_stages: int) -> Measurement:
    """By the rule above."""
    num_settings = Counter(each.experiment for each in _every())
    return min(
        measurements,
        key=lambda each: (
            not each.is_language,
            len(each.seeds) == 1,
            abs(math.log(each.num_stages / num_stages)),
            -len(each.seeds),
            -num_settings[each.experiment],
            -each.model_size,
            -each.budget,
            -each.share.mean,
        ),
    )
