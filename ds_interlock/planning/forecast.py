"""A setting simulated at a model's costs: how long a batch takes, and how much memory and traffic.

    comparison = compare(interlock, profile, profile.balanced_bounds(8), num_micro_batches=4)

The setting of the configuration comes first, global second. A setting that does not exist for these
stages (window 3 on two stages, a head within a stage of one layer) is left out and named in ``skipped``.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

from ds_interlock.config import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.planning.profile import Profile
from ds_interlock.planning.quality import beats_local, gap_recovered, measurement
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


@dataclass(frozen=True)
class Forecast(Simulation):
    """What one setting would do. Times are in seconds (of a unit profile: in forwards of a stage)."""

    name: str  # for tables: "window 1.25, stride 2"
    window: float  # stages one loss reaches back over; all for global, 1 for local
    plan: GradientFlowPlan
    activation_bytes: tuple[float, ...]  # by stage: of the micro-batches in flight
    head_share: float  # share of all work that is auxiliary heads
    speed: float  # times as fast as global (1F1B)
    gap_recovered: float | None  # as measured in our experiments (quality.py); None: not measured
    beats_local: bool | None  # likewise, with heads of the same kind
    measured_in: str | None  # the experiment, and its model
    copy_bytes: float  # of the unembedding, over a link every refresh_every batches, for heads upstream
    refresh_every: int
    refresh_at_least: int  # with fewer batches between two copies stages wait for them
    is_reference: bool  # it is here to compare with and cannot be run


@dataclass(frozen=True)
class Comparison:
    """Forecasts of one model on one pipeline."""

    profile: Profile
    num_micro_batches: int
    configured: Forecast
    others: tuple[Forecast, ...]  # global (1F1B) first
    skipped: tuple[str, ...] = ()  # settings that do not exist here, each with the reason
    syncs_ties: bool = False  # stages share weights that are kept equal: no setting streams

    @property
    def reference(self) -> Forecast:
        """Global backpropagation as DeepSpeed runs it."""
        return self.others[0]

    @property
    def all(self) -> tuple[Forecast, ...]:
        """Every setting once: the configured one first, marked if it is one of the others too."""
        return (self.configured, *(other for other in self.others if other.name != self.configured.name))


def setting_name(interlock: InterlockConfig) -> str:
    """How a setting is called in tables and pictures."""
    if interlock.is_global:
        return GLOBAL
    parts = ["local" if interlock.mode == "local" else f"window {interlock.window:g}"]
    if interlock.combine == "farthest":
        parts.append("farthest")
    if interlock.head_stride > 1:
        parts.append(f"stride {interlock.head_stride}")
    if interlock.extra_in_flight:
        parts.append(f"{interlock.extra_in_flight} extra")
    if not interlock.streaming:
        parts.append("no streaming")
    return ", ".join(parts)


def settings_to_compare(interlock: InterlockConfig) -> list[InterlockConfig]:
    """The settings a user would choose between, with the heads and ties of ``interlock``."""
    keep = {"mode": "interlock", "head": interlock.head, "tied_weights": interlock.tied_weights}
    return [InterlockConfig.model_validate(keep | keys) for keys in _COMPARED]


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
    played: list[Forecast] = []
    skipped: list[str] = []
    settings = settings_to_compare(interlock)
    for setting in settings if len(stage_bounds) > 2 else settings[:1]:  # on one stage all are global
        try:
            is_configured = setting_name(setting) == configured.name
            played.append(
                configured if is_configured else forecast(setting, profile, stage_bounds, num_micro_batches)
            )
        except ConfigError as error:
            skipped.append(f"{setting_name(setting)}: {error.__cause__ or error}")
    plan = played[0].plan
    batches = zero_bubble_batches(plan, num_micro_batches, profile.cost_model(stage_bounds), _NUM_BATCHES)
    played.insert(1, _forecast_of(batches, profile, plan, ZERO_BUBBLE, InterlockConfig()))
    configured, *played = [
        replace(each, speed=played[0].batch_seconds / each.batch_seconds) for each in (configured, *played)
    ]
    syncs_ties = profile.is_tied_across(stage_bounds) and interlock.tied_weights == "sync"
    return Comparison(profile, num_micro_batches, configured, tuple(played), tuple(skipped), syncs_ties)


def forecast(
    interlock: InterlockConfig, profile: Profile, stage_bounds: Sequence[int], num_micro_batches: int
) -> Forecast:
    """One setting by itself (``speed`` 1); a ConfigError if it does not exist for these stages."""
    costs, tied = profile.cost_model(stage_bounds), profile.is_tied_across(stage_bounds)
    plan, simulation = play(interlock, costs, stage_bounds, num_micro_batches, tied=tied)
    return _forecast_of(simulation, profile, plan, setting_name(interlock), interlock)


def _forecast_of(
    simulation: Simulation, profile: Profile, plan: GradientFlowPlan, name: str, interlock: InterlockConfig
) -> Forecast:
    spans = [span for row in simulation.spans for span in row]
    heads = [s for s in spans if s.action.kind is Kind.HEAD and s.action.losses != (plan.final,)]
    busy = sum(span.end - span.start for span in spans)
    measured = measurement(interlock)
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
        gap_recovered=gap_recovered(interlock),
        beats_local=beats_local(interlock),
        measured_in=f'"{measured.experiment}", {measured.where}' if measured else None,
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
