"""A setting simulated at a model's costs: how long a batch takes, and how much memory and traffic.

    comparison = compare(interlock, profile, profile.balanced_bounds(8), num_micro_batches=4)

The setting of the configuration comes first, global second. A setting that does not exist for these
stages (window 3 on two stages, a head within a stage of one layer) is left out and named in ``skipped``; one
that was measured to learn no better than local, in ``no_better``. Unless configured, it is not worth a row.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

from ds_interlock.config import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.planning.profile import Profile
from ds_interlock.planning.quality import Measurement, beats_local, measurement, schedules, setting_of
from ds_interlock.planning.zero_bubble import zero_bubble_batches
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.program import training_program
from ds_interlock.schedule.simulate import Simulation, simulate

GLOBAL = "global (1F1B)"
ZERO_BUBBLE = "global (ZB-H1)"
_NUM_BATCHES = 4
_COMPARED: tuple[dict[str, Any], ...] = (
    {"mode": "global"},
    {"mode": "local"},
    {"window": 1.25},
    {"window": 1.25, "extra_in_flight": 1},
    {"window": 1.5},
    {"window": 2},
    {"window": 2, "head_stride": 2},
    {"window": 3},
    {"window": 3, "head_stride": 2},
    {"window": 3, "head_stride": 3},
)
_DEEPER: tuple[dict[str, Any], ...] = ({"mode": "local"}, {"window": 1.5}, {"window": 2}, {"window": 3})
"""With heads of one block, if the configured ones have none."""


@dataclass(frozen=True)
class Forecast(Simulation):
    """What one setting would do. Times are in seconds (of a unit profile: in forwards of a stage)."""

    name: str  # for tables: "window 1.25, stride 2"
    window: float  # stages one loss reaches back over; all for global, 1 for local
    plan: GradientFlowPlan
    activation_bytes: tuple[float, ...]  # by stage: of the micro-batches in flight
    head_share: float  # share of all work that is auxiliary heads
    speed: float  # times as fast as global (1F1B)
    measured: Measurement | None  # how well it learns (quality.py)
    beats_local: bool | None  # likewise; None: not measured, local or global
    copy_bytes: float  # of the unembedding, over a link every refresh_every batches, for heads upstream
    refresh_every: int
    refresh_at_least: int  # with fewer batches between two copies stages wait for them
    is_reference: bool  # it is here to compare with and cannot be run

    @property
    def is_exact(self) -> bool:
        """Whether its gradients are those of global."""
        return self.plan.is_end_to_end

    @property
    def gap_recovered(self) -> float | None:
        """The share of the gap from local to global that it closed; None: not measured."""
        return 1.0 if self.is_exact else self.measured.share.mean if self.measured else None

    @property
    def relative_steps(self) -> float | None:
        """Expected steps to global's loss, over global's; None: not measured, or not reached."""
        if self.is_exact:
            return 1.0
        return self.measured.steps.mean if self.measured and self.measured.steps else None

    @property
    def speed_to_loss(self) -> float | None:
        """How many times as fast as global (1F1B) it is expected to reach global's loss; None likewise."""
        return self.speed / self.relative_steps if self.relative_steps else None


@dataclass(frozen=True)
class ScheduleForecast:
    """A schedule of windows that reached global's loss in one of our experiments."""

    name: str  # "local, then window 2"
    phases: tuple[tuple[float, Forecast], ...]  # where each begins, over global's steps
    measured: Measurement
    speed_to_loss: float  # expected, times as fast as global (1F1B)

    @property
    def gap_recovered(self) -> float:
        """The share of the gap from local to global that it closed."""
        return self.measured.share.mean

    @property
    def relative_steps(self) -> float:
        """Expected steps to global's loss, over global's."""
        assert self.measured.steps is not None
        return self.measured.steps.mean


@dataclass(frozen=True)
class Comparison:
    """Forecasts of one model on one pipeline."""

    profile: Profile
    num_micro_batches: int
    configured: Forecast
    others: tuple[Forecast, ...]  # global (1F1B) first
    schedules: tuple[ScheduleForecast, ...] = ()
    skipped: tuple[str, ...] = ()  # settings that do not exist here, each with the reason
    no_better: tuple[str, ...] = ()  # settings that are left out because local learns as well
    syncs_ties: bool = False  # stages share weights that are kept equal: no setting streams

    @property
    def reference(self) -> Forecast:
        """Global backpropagation as DeepSpeed runs it."""
        return self.others[0]

    @property
    def all(self) -> tuple[Forecast, ...]:
        """Every setting once: the configured one first, marked if it is one of the others too."""
        return (self.configured, *(other for other in self.others if other.name != self.configured.name))

    @property
    def sources(self) -> dict[str, list[str]]:
        """The experiments that measured how well settings learn, in words, each with its settings' names."""
        sources: dict[str, list[str]] = {}
        settings: list[Forecast | ScheduleForecast] = [*self.all, *self.schedules]
        for each in settings:
            if each.measured:
                sources.setdefault(each.measured.place, []).append(each.name)
        return sources


def setting_name(interlock: InterlockConfig) -> str:
    """How a setting is called in tables and pictures."""
    if interlock.is_global:
        return GLOBAL
    window = interlock.window or 1
    parts = ["local" if window == 1 else f"window {window:g}"]
    if interlock.combine == "farthest":
        parts.append("farthest")
    if interlock.head_stride > 1:
        parts.append(f"stride {interlock.head_stride}")
    if interlock.extra_in_flight:
        parts.append(f"{interlock.extra_in_flight} extra")
    if not interlock.streaming:
        parts.append("no streaming")
    if any(blocks := _by_stage(interlock.head.blocks)):
        parts.append(f"{'-'.join(map(str, blocks))} block{'s' * (blocks != (1,))}")
    return ", ".join(parts)


def _by_stage(blocks: int | tuple[int, ...]) -> tuple[int, ...]:
    return (blocks,) if isinstance(blocks, int) else blocks


def settings_to_compare(interlock: InterlockConfig) -> list[InterlockConfig]:
    """The settings a user would choose between, with the heads and ties of ``interlock``."""
    keep = {"mode": "interlock", "head": interlock.head, "tied_weights": interlock.tied_weights}
    settings = [keep | keys for keys in _COMPARED]
    if not any(_by_stage(interlock.head.blocks)):
        head = interlock.head.model_copy(update={"blocks": 1})
        settings += [keep | {"head": head} | keys for keys in _DEEPER]
    return [InterlockConfig.model_validate(keys) for keys in settings]


def compare(
    interlock: InterlockConfig, profile: Profile, stage_bounds: Sequence[int], num_micro_batches: int
) -> Comparison:
    """Plays ``interlock`` through, and what else one might choose; ConfigError if all that does not fit."""
    gc.disable()  # actions and spans are millions of tuples, never in a circle: a quarter of the time
    try:
        return _compare(interlock, profile, stage_bounds, num_micro_batches)
    finally:
        gc.enable()


def _compare(
    interlock: InterlockConfig, profile: Profile, stage_bounds: Sequence[int], num_micro_batches: int
) -> Comparison:
    if stage_bounds[-1] != (number := len(profile.layers)):
        raise ConfigError(f"stage bounds {list(stage_bounds)} do not end at {number}, the profile's layers")
    configured = forecast(interlock, profile, stage_bounds, num_micro_batches)
    played: list[tuple[InterlockConfig, Forecast]] = []
    skipped: list[str] = []
    no_better: list[str] = []
    settings, num_stages = settings_to_compare(interlock), len(stage_bounds) - 1
    for setting in settings if num_stages > 1 else settings[:1]:  # on one stage all are global
        name = setting_name(setting)
        if name == configured.name:
            played.append((setting, configured))
        elif beats_local(setting, num_stages) is False:
            no_better.append(name)
        else:
            try:
                played.append((setting, forecast(setting, profile, stage_bounds, num_micro_batches)))
            except ConfigError as error:
                skipped.append(f"{name}: {error.__cause__ or error}")
    seconds, plan = played[0][1].batch_seconds, played[0][1].plan
    played = [(setting, replace(each, speed=seconds / each.batch_seconds)) for setting, each in played]
    batches = zero_bubble_batches(plan, num_micro_batches, profile.cost_model(stage_bounds), _NUM_BATCHES)
    zero_bubble = _forecast_of(batches, profile, plan, ZERO_BUBBLE, InterlockConfig())
    reference, *others = [each for _, each in played]
    return Comparison(
        profile,
        num_micro_batches,
        replace(configured, speed=seconds / configured.batch_seconds),
        (reference, replace(zero_bubble, speed=seconds / zero_bubble.batch_seconds), *others),
        schedules=tuple(_schedules(played)),
        skipped=tuple(skipped),
        no_better=tuple(no_better),
        syncs_ties=profile.is_tied_across(stage_bounds) and interlock.tied_weights == "sync",
    )


def _schedules(played: Sequence[tuple[InterlockConfig, Forecast]]) -> Iterator[ScheduleForecast]:
    """The measured schedules of windows that are not the whole pipeline, if all phases have been played."""
    by_setting: dict[tuple[Any, ...], Forecast] = {}
    for setting, each in played:
        if setting.is_global or not each.is_exact:
            by_setting.setdefault(setting_of(setting), each)
    for measured in schedules(played[0][1].plan.num_stages):
        starts = [start for start, _ in measured.phases]
        phases = [by_setting.get(setting_of(section)) for _, section in measured.phases]
        known = [phase for phase in phases if phase]
        if measured.steps and len(known) == len(phases):
            steps = measured.steps.mean
            ends = [min(start, steps) for start in (*starts[1:], steps)]
            time = sum((end - start) / p.speed for start, end, p in zip(starts, ends, known, strict=True))
            name = ", then ".join("global" if phase.is_exact else phase.name for phase in known)
            yield ScheduleForecast(name, tuple(zip(starts, known, strict=True)), measured, 1.0 / time)


def forecast(
    interlock: InterlockConfig, profile: Profile, stage_bounds: Sequence[int], num_micro_batches: int
) -> Forecast:
    """One setting by itself (``speed`` 1); a ConfigError if it does not exist for these stages."""
    costs = profile.cost_model(stage_bounds, interlock.head)
    tied = profile.is_tied_across(stage_bounds)
    plan, simulation = play(interlock, costs, stage_bounds, num_micro_batches, tied=tied)
    return _forecast_of(simulation, profile, plan, setting_name(interlock), interlock)


def _forecast_of(
    simulation: Simulation, profile: Profile, plan: GradientFlowPlan, name: str, interlock: InterlockConfig
) -> Forecast:
    spans = [span for row in simulation.spans for span in row]
    heads = [s for s in spans if s.action.kind is Kind.HEAD and s.action.losses != (plan.final,)]
    busy = sum(span.end - span.start for span in spans)
    num_links = plan.num_stages - 1 - min(head.stage for head in plan.heads)
    copy_bytes = profile.head.copy_bytes if num_links else 0.0
    copy_seconds = profile.latency_seconds + copy_bytes / (profile.bandwidth_bytes_per_second or inf)
    # On its way a copy waits on each stage until that has come as far: stages are a batch ahead of the next.
    refresh_at_least = ceil(num_links * (1 + copy_seconds / simulation.batch_seconds)) if copy_bytes else 1
    kept = zip(simulation.in_flight, profile.activation_bytes(plan.stage_bounds), strict=True)
    return Forecast(
        **vars(simulation),
        name=name,
        window=plan.num_stages if interlock.is_global else interlock.window or 1,
        plan=plan,
        activation_bytes=tuple(number * size for number, size in kept),
        head_share=sum(span.end - span.start for span in heads) / busy if busy else 0.0,
        speed=1.0,
        measured=None if plan.is_end_to_end else measurement(interlock, plan.num_stages),
        beats_local=None if plan.is_end_to_end else beats_local(interlock, plan.num_stages),
        copy_bytes=copy_bytes,
        refresh_every=interlock.head.refresh_every,
        refresh_at_least=refresh_at_least,
        is_reference=name == ZERO_BUBBLE,
    )


def play(
    interlock: InterlockConfig,
    costs: CostModel,
    stage_bounds: Sequence[int],
    num_micro_batches: int,
    *,
    tied: bool = False,
    num_batches: int = _NUM_BATCHES,
) -> tuple[GradientFlowPlan, Simulation]:
    """The plan of a setting, and a simulation of some batches of it; ``tied``: if stages share weights.

    ConfigError if the setting does not exist for these stages, or has a schedule.
    """
    plan = interlock.plan(stage_bounds)
    program = training_program(plan, num_micro_batches, extra_in_flight=interlock.extra_in_flight)
    streaming = interlock.streams(plan, tied=tied)
    return plan, simulate(program, costs, num_batches=num_batches, streaming=streaming)
