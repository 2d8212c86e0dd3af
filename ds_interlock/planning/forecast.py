"""A setting simulated at a model's costs: how long a batch takes, and how much memory and traffic.

    forecasts = compare(interlock, profile, num_stages=8, num_micro_batches=4)

The setting of the configuration comes first, global second. A setting that does not exist for these
stages (window 3 on two stages, a head within a stage of one layer) is left out and named in ``skipped``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_interlock.config import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.planning.profile import Profile
from ds_interlock.planning.zero_bubble import zero_bubble_batch
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.cost import CostModel
from ds_interlock.schedule.lower import Program, training_program
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.simulate import Simulation, Span, simulate

GLOBAL = "global (1F1B)"
ZERO_BUBBLE = "global (ZB-H1)"
_NUM_BATCHES = 4


@dataclass(frozen=True)
class Forecast:
    """What one setting would do. Times are in seconds (or, of a unit profile, in forwards of a stage).

    Attributes:
        name: Of the setting, for tables: "window 1.25, stride 2".
        window: Stages one loss reaches back over; the number of stages for global, 1 for local.
        stage_bounds: Layers of the stages.
        num_micro_batches: Micro-batches in a batch.
        batch_seconds: Time a batch takes once the pipeline is running.
        bubble_fraction: Share of the stages' time in which they wait.
        in_flight: For each stage the most micro-batches it holds activations of at once.
        activation_bytes: For each stage the bytes of those activations.
        relay_bytes: For each stage the bytes of gradients it sends upstream for one batch.
        head_share: Share of the work, over all stages, that auxiliary heads are.
        speed: How many times as fast as global (1F1B).
        rows: For each stage its spans, over some batches.
        is_reference: True for a schedule that is here to compare with and cannot be run.
    """

    name: str
    window: float
    stage_bounds: tuple[int, ...]
    num_micro_batches: int
    batch_seconds: float
    bubble_fraction: float
    in_flight: tuple[int, ...]
    activation_bytes: tuple[float, ...]
    relay_bytes: tuple[float, ...]
    head_share: float
    speed: float
    rows: tuple[tuple[Span, ...], ...]
    is_reference: bool = False

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages, K."""
        return len(self.stage_bounds) - 1


@dataclass(frozen=True)
class Comparison:
    """Forecasts of one model on one pipeline.

    Attributes:
        profile: The costs.
        configured: The setting of the configuration.
        others: Those it is compared with; global (1F1B) is the first.
        skipped: Settings that do not exist here, each with the reason.
        syncs_ties: True if stages share weights that are kept equal, so that no setting streams.
    """

    profile: Profile
    configured: Forecast
    others: tuple[Forecast, ...]
    skipped: tuple[str, ...] = ()
    syncs_ties: bool = False

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
    keep = {"head": interlock.head, "tied_weights": interlock.tied_weights}

    def window(size: float, **keys: int) -> InterlockConfig:
        return InterlockConfig.model_validate({"mode": "interlock", "window": size, **keep, **keys})

    return [
        InterlockConfig.model_validate({"mode": "global", **keep}),
        InterlockConfig.model_validate({"mode": "local", **keep}),
        window(1.25),
        window(1.25, extra_in_flight=1),
        window(1.5),
        window(2),
        window(2, head_stride=2),
        window(3),
        window(3, head_stride=2),
        window(3, head_stride=3),
    ]


def compare(
    interlock: InterlockConfig,
    profile: Profile,
    num_micro_batches: int,
    *,
    num_stages: int | None = None,
    stage_bounds: Sequence[int] | None = None,
) -> Comparison:
    """Plays ``interlock`` through, and what else one might choose.

    Args:
        interlock: The configured setting.
        profile: What the layers cost.
        num_micro_batches: Micro-batches in a batch.
        num_stages: Stages, cut so that they are as even as can be; or give ``stage_bounds``.
        stage_bounds: ``num_stages + 1`` rising layer numbers, the first 0, the last the number of layers.

    Raises:
        ConfigError: If the configured setting, the stages and the profile do not fit together.
    """
    if stage_bounds is None:
        assert num_stages is not None, "one of the two is needed"
        stage_bounds = profile.balanced_bounds(num_stages)
    elif stage_bounds[-1] != len(profile.layers):
        raise ConfigError(
            f"stage bounds {list(stage_bounds)} end at layer {stage_bounds[-1]}, but the profile has "
            f"{len(profile.layers)} layers"
        )
    bounds = tuple(stage_bounds)
    configured = forecast(interlock, profile, bounds, num_micro_batches)
    played: list[Forecast] = []
    skipped: list[str] = []
    for setting in settings_to_compare(interlock):
        if setting_name(setting) == configured.name:
            played.append(configured)
            continue
        try:
            played.append(forecast(setting, profile, bounds, num_micro_batches))
        except ConfigError as error:
            skipped.append(f"{setting_name(setting)}: {error.__cause__ or error}")
    played.insert(1, _zero_bubble(profile, bounds, num_micro_batches))
    pace = played[0].batch_seconds
    return Comparison(
        profile=profile,
        configured=_relative(configured, pace),
        others=tuple(_relative(each, pace) for each in played),
        skipped=tuple(skipped),
        syncs_ties=profile.is_tied_across(bounds) and interlock.tied_weights == "sync",
    )


def forecast(
    interlock: InterlockConfig, profile: Profile, stage_bounds: Sequence[int], num_micro_batches: int
) -> Forecast:
    """One setting by itself; its ``speed`` is relative to itself, 1.

    Raises:
        ConfigError: If the setting does not exist for these stages.
    """
    costs, tied = profile.cost_model(stage_bounds), profile.is_tied_across(stage_bounds)
    program, simulation = play(interlock, costs, stage_bounds, num_micro_batches, tied=tied)
    plan = program.plan
    kept = profile.activation_bytes(stage_bounds)
    return Forecast(
        name=setting_name(interlock),
        window=_window(interlock, plan),
        stage_bounds=plan.stage_bounds,
        num_micro_batches=num_micro_batches,
        batch_seconds=simulation.batch_seconds,
        bubble_fraction=simulation.bubble_fraction,
        in_flight=simulation.peak_in_flight,
        activation_bytes=tuple(
            number * size for number, size in zip(simulation.peak_in_flight, kept, strict=True)
        ),
        relay_bytes=simulation.relay_bytes,
        head_share=_head_share(plan, simulation),
        speed=1.0,
        rows=simulation.spans,
    )


def play(
    interlock: InterlockConfig,
    costs: CostModel,
    stage_bounds: Sequence[int],
    num_micro_batches: int,
    *,
    tied: bool = False,
    num_batches: int = _NUM_BATCHES,
) -> tuple[Program, Simulation]:
    """The program of a setting, and a simulation of some batches of it.

    Args:
        interlock: The setting, without a schedule.
        costs: What the stages cost.
        stage_bounds: ``num_stages + 1`` rising layer numbers.
        num_micro_batches: Micro-batches in a batch.
        tied: Whether stages share weights.
        num_batches: Batches to simulate.

    Raises:
        ConfigError: If the setting does not exist for these stages.
    """
    plan = interlock.plan(stage_bounds)
    program = training_program(plan, num_micro_batches, extra_in_flight=interlock.extra_in_flight)
    streaming = interlock.streams(plan, tied=tied)
    return program, simulate(program, costs, num_batches=num_batches, streaming=streaming)


def _window(interlock: InterlockConfig, plan: GradientFlowPlan) -> float:
    if interlock.is_global:
        return plan.num_stages
    return 1 if interlock.window is None else interlock.window


def _relative(each: Forecast, pace: float) -> Forecast:
    return replace(each, speed=pace / each.batch_seconds)


def _head_share(plan: GradientFlowPlan, simulation: Simulation) -> float:
    spans = [span for row in simulation.spans for span in row]
    heads = [s for s in spans if s.action.kind is Kind.HEAD and s.action.losses != (plan.final,)]
    busy = sum(span.end - span.start for span in spans)
    return sum(span.end - span.start for span in heads) / busy if busy else 0.0


def _zero_bubble(profile: Profile, bounds: tuple[int, ...], num_micro_batches: int) -> Forecast:
    """The reference line: ZB-H1 batches one after the other, each ended by the optimizer step."""
    costs = profile.cost_model(bounds)
    num_stages = len(bounds) - 1
    plan = GradientFlowPlan.end_to_end(stage_bounds=bounds)
    batch = zero_bubble_batch(bounds, num_micro_batches, costs)
    flush = max(row[-1].end for row in batch)
    steps = [Action(stage, Kind.STEP, num_micro_batches) for stage in range(num_stages)]
    rows = [
        (*row, Span(step, 0, flush, flush + costs.seconds(plan, step)))
        for row, step in zip(batch, steps, strict=True)
    ]
    seconds = max(row[-1].end for row in rows)
    busy = sum(span.end - span.start for row in rows for span in row)
    held = tuple(min(num_stages, num_micro_batches) for _ in range(num_stages))
    kept = profile.activation_bytes(bounds)
    sizes = [costs.message_bytes(Action(s, Kind.SEND_GRADIENT, 0)) for s in range(num_stages)]
    return Forecast(
        name=ZERO_BUBBLE,
        window=num_stages,
        stage_bounds=bounds,
        num_micro_batches=num_micro_batches,
        batch_seconds=seconds,
        bubble_fraction=1.0 - busy / (seconds * num_stages) if seconds else 0.0,
        in_flight=held,
        activation_bytes=tuple(number * size for number, size in zip(held, kept, strict=True)),
        relay_bytes=tuple(num_micro_batches * size for size in sizes),
        head_share=0.0,
        speed=1.0,
        rows=_repeat(rows, seconds),
        is_reference=True,
    )


def _repeat(rows: Sequence[Sequence[Span]], seconds: float) -> tuple[tuple[Span, ...], ...]:
    return tuple(
        tuple(
            replace(span, batch=batch, start=span.start + batch * seconds, end=span.end + batch * seconds)
            for batch in range(_NUM_BATCHES)
            for span in row
        )
        for row in rows
    )
