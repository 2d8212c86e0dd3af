"""``ds-interlock plan``: what a configuration would cost, beside what else one might choose."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds_interlock.commands import terminal
from ds_interlock.commands.profile import DEFAULT_SEQ_LENGTH, TRUST, micro_batch_size_of
from ds_interlock.commands.terminal import at_least_one, positive
from ds_interlock.config import InterlockConfig, check_deepspeed, read_deepspeed
from ds_interlock.errors import ConfigError
from ds_interlock.files import replace_text
from ds_interlock.planning.forecast import Comparison, Forecast, ScheduleForecast, compare
from ds_interlock.planning.page import render_page
from ds_interlock.planning.profile import Profile, unit_profile
from ds_interlock.planning.verdict import about_schedule, best_interlock, best_schedule, pays, verdict
from ds_interlock.schedule.picture import draw_plan
from ds_interlock.schedule.plan import rises
from ds_interlock.schedule.render import Timeline, render_svg
from ds_interlock.schedule.trace import chrome_trace

_DEFAULT_STAGES = 4
_UNIT_LAYERS_PER_STAGE = 4
_BATCHES_IN_PICTURES = (1, 2)  # the first to start while the pipeline is running, and the next
_NOT_IN_JSON = {"spans", "plan", "measured"}

_PLAN = """\
Simulates CONFIG's plan (of a schedule, the plan of each phase) and prints the time of a batch, the
bubble, the micro-batches in flight and their activations, the gradients relayed, the share of the auxiliary
heads, and the speed relative to global backpropagation (1F1B, as DeepSpeed runs it); beside it, as far as our
experiments tell, the steps to global's loss and so the time to it; then says whether interlocking pays here.

Costs come from --profile (measured by `ds-interlock profile`), from --model (estimated from the sizes in
a Hugging Face configuration; no weights are loaded, no GPU is needed), or, with neither, are those of
equal layers: a stage's forward, input gradient and weight gradient 1 each, a head 0.3.
"""

_LEGEND = """\
* configured. x global: times as fast as global (1F1B). Gap: the share of local's gap to global it closes.
Steps: to global's loss, over global's. To loss: times as fast as global to its loss, x global over steps.
In flight: micro-batches, by stage. Activations, relays: per batch, of the stage with the most."""


def add_parser(commands: Any) -> None:
    """Adds ``plan`` to the subcommands."""
    summary = "predict a config's speed and memory, and whether interlocking pays"
    parser = terminal.add_command(commands, "plan", run, summary=summary, description=_PLAN)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="DeepSpeed JSON config")
    stages = f"pipeline stages (default: {_DEFAULT_STAGES})"
    add("--stages", type=at_least_one, metavar="K", help=stages)
    micro_batches = "in a batch (default: CONFIG's gradient_accumulation_steps)"
    add("--micro-batches", type=at_least_one, metavar="M", help=micro_batches)
    add("--bounds", type=_bounds, metavar="0,3,...", help="first layer of each stage; number of layers")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--profile", metavar="FILE", help="measured costs, from `ds-interlock profile`")
    add("--model", metavar="NAME_OR_PATH", help="estimate from this Hugging Face config")
    parser.add_argument("--trust-remote-code", "--trust_remote_code", action="store_true", help=TRUST)
    add = parser.add_argument_group("assumptions of --model").add_argument
    default = "(default: %(default)g)"
    add("--seq-length", type=at_least_one, default=DEFAULT_SEQ_LENGTH, metavar="T")
    add("--tflops", type=positive, default=150.0, help=f"of a device {default}")
    add("--bandwidth", type=positive, default=25.0, metavar="GB/S", help=f"of a link {default}")
    add("--latency", type=positive, default=20.0, metavar="US", help=f"of a message {default}")
    add = parser.add_argument_group("output").add_argument
    add("--compare", action="store_true", help="show every setting, not CONFIG's alone")
    add("--json", action="store_true", help="print JSON")
    add("--svg", type=Path, metavar="FILE", help="write the timelines as a picture")
    add("--trace", type=Path, metavar="FILE", help="write the timelines for ui.perfetto.dev")
    add("--html", type=Path, metavar="FILE", help="write a page with sliders for M and K")


def run(options: argparse.Namespace) -> int:
    """Prints the report and writes the pictures."""
    contents = read_deepspeed(options.config)
    interlock = InterlockConfig.from_deepspeed(options.config)
    check_deepspeed(contents)
    _check_phases(options, interlock)
    if options.bounds and options.stages and options.stages != len(options.bounds) - 1:
        raise ConfigError(f"--bounds has {len(options.bounds) - 1} stages and --stages is {options.stages}")
    num_stages = len(options.bounds) - 1 if options.bounds else options.stages or _DEFAULT_STAGES
    num_micro_batches = options.micro_batches or _micro_batches_of(contents)
    profile = _profile(options, interlock, contents, num_stages)
    bounds = options.bounds or profile.balanced_bounds(num_stages)
    reports = []
    for from_step, section in interlock.phases:
        comparison = compare(section, profile, bounds, num_micro_batches)
        forecasts = comparison.all
        if not options.compare:  # the configured setting and global, once if they are the same
            forecasts = tuple(each for each in forecasts if each in (forecasts[0], comparison.reference))
        reports.append(_as_json(comparison, forecasts))
        if not options.json:
            if interlock.schedule is not None:
                print(f"From step {from_step}:\n")
            _print_report(comparison, forecasts, is_comparison=options.compare)
    if options.json:
        terminal.print_json(interlock, reports)
    elif interlock.schedule is not None:
        print(f"\n{about_schedule(interlock, comparison)}")
    pictured = _timelines(comparison, forecasts)
    if options.svg:
        title = f"{num_micro_batches} micro-batches on {num_stages} stages"
        replace_text(options.svg, render_svg(pictured, title))
    if options.trace:
        replace_text(options.trace, json.dumps(chrome_trace(pictured, profile.model)))
    if options.html:
        replace_text(options.html, render_page(interlock, profile, bounds, num_micro_batches))
    return 0


def _check_phases(options: argparse.Namespace, interlock: InterlockConfig) -> None:
    """Raises ConfigError if pictures are wanted of a plan that changes."""
    flags = ", ".join(f"--{name}" for name in ("svg", "trace", "html") if getattr(options, name))
    if (number := len(interlock.phases)) > 1 and flags:
        raise ConfigError(f"{flags}: a picture is of one plan, but interlock.schedule has {number} phases")


def _print_report(comparison: Comparison, forecasts: Sequence[Forecast], *, is_comparison: bool) -> None:
    """The plan, the costs, the forecasts as a table, and the verdict."""
    profile, reference = comparison.profile, comparison.reference
    print(draw_plan(comparison.configured.plan), end="\n\n")
    bounds = ", ".join(map(str, reference.plan.stage_bounds))
    batches = f"{comparison.num_micro_batches} micro-batches per batch"
    print(f"{profile.model}: {len(profile.layers)} layers, stage bounds {bounds}; {batches}")
    print(f"costs: {profile.source}")
    if not profile.is_unit:
        print(f"a job with these stages: --stage_bounds {bounds.replace(' ', '')}")
    batch = f"batch ({_unit_of(comparison)})"
    quality = ("gap", "steps", "to loss")
    heads = ("setting", batch, "x global", *quality, "bubble", "heads", "in flight", "activations", "relays")
    schedules = comparison.schedules if is_comparison else ()
    rows = [_row(comparison, each) for each in forecasts]
    print()
    terminal.print_table(heads, rows + [_schedule_row(each, len(heads)) for each in schedules])
    print(f"\n{_LEGEND}")
    shown = {each.name for each in forecasts} | {each.name for each in schedules}
    for place, names in comparison.sources.items():
        if known := [name for name in names if name in shown]:
            print(f"measured in {place}: {'; '.join(known)}")
    if is_comparison and comparison.no_better:
        print(f"left out, not measured to learn better than local: {'; '.join(comparison.no_better)}")
    if copy_bytes := (configured := comparison.configured).copy_bytes:
        size, every = tqdm.format_sizeof(copy_bytes, "B"), configured.refresh_every
        print(f"Copies of the unembedding: {size} over a link every {every} batches; a stage keeps two.")
    for reason in comparison.skipped:
        print(f"left out: {reason}")
    if comparison.syncs_ties:
        print('stages share weights, interlock.tied_weights is "sync": no setting streams')
    print(f"\n{verdict(comparison)}")


def _unit_of(comparison: Comparison) -> str:
    """The unit of a comparison's times: seconds, or forwards of a stage where nothing was measured."""
    return "forwards" if comparison.profile.is_unit else "s"


def _as_json(comparison: Comparison, forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """What ``--json`` prints: every forecast without its spans, and the verdict."""
    best, schedule = best_interlock(comparison), best_schedule(comparison)
    return {
        "model": comparison.profile.model,
        "costs": comparison.profile.source,
        "unit": _unit_of(comparison),
        "num_stages": comparison.reference.plan.num_stages,
        "num_micro_batches": comparison.num_micro_batches,
        "stage_bounds": list(comparison.reference.plan.stage_bounds),
        "configured": comparison.configured.name,
        "settings": [_setting_as_json(each) for each in forecasts],
        "schedules": [
            {
                "name": each.name,
                "phases": [[start, phase.name] for start, phase in each.phases],
                **_quality_as_json(each),
            }
            for each in comparison.schedules
        ],
        "skipped": list(comparison.skipped),
        "no_better": list(comparison.no_better),
        "pays": pays(comparison),
        "best_interlock": best.name if best else None,
        "best_schedule": schedule.name if schedule else None,
        "verdict": verdict(comparison),
    }


def _setting_as_json(each: Forecast) -> dict[str, Any]:
    values = {key: value for key, value in vars(each).items() if key not in _NOT_IN_JSON}
    return {**values, **_quality_as_json(each)}


def _quality_as_json(each: Forecast | ScheduleForecast) -> dict[str, Any]:
    """How well it learns as far as it was measured, and where."""
    return {
        "gap_recovered": each.gap_recovered,
        "relative_steps": each.relative_steps,
        "speed_to_loss": each.speed_to_loss,
        "measured": each.measured and each.measured.model_dump(mode="json"),
    }


def _timelines(comparison: Comparison, forecasts: Sequence[Forecast]) -> list[Timeline]:
    """Two batches of each setting in the running pipeline."""
    unit = _unit_of(comparison)
    return [
        Timeline(
            f"{each.name}: {each.batch_seconds:.4g} {unit} per batch",
            unit,
            tuple(tuple(span for span in row if span.batch in _BATCHES_IN_PICTURES) for row in each.spans),
        )
        for each in forecasts
    ]


def _row(comparison: Comparison, each: Forecast) -> tuple[str, ...]:
    return (
        f"{each.name} *" if each.name == comparison.configured.name else each.name,
        f"{each.batch_seconds:.4g}",
        f"{each.speed:.2f}",
        *_quality(each),
        f"{each.bubble_fraction:.0%}",
        f"{each.head_share:.1%}",
        _by_stage(each.in_flight),
        # Of layers without a model no sizes are known.
        "-" if comparison.profile.is_unit else tqdm.format_sizeof(max(each.activation_bytes), "B"),
        "-" if comparison.profile.is_unit else tqdm.format_sizeof(max(each.relay_bytes), "B"),
    )


def _schedule_row(each: ScheduleForecast, length: int) -> tuple[str, ...]:
    """A schedule has a speed in each phase, and no batch of its own."""
    speeds = ", ".join(f"{phase.speed:.2f}" for _, phase in each.phases)
    cells = (each.name, "-", speeds, *_quality(each))
    return cells + ("-",) * (length - len(cells))


def _quality(each: Forecast | ScheduleForecast) -> tuple[str, str, str]:
    """The share of the gap that it closed, its steps to global's loss, and its speed to it."""
    gap = "-" if each.gap_recovered is None else f"{each.gap_recovered:.0%}"
    if each.speed_to_loss is None:
        return gap, "not reached" if each.measured else "not measured", "-"
    return gap, f"{each.relative_steps:.2f}", f"{each.speed_to_loss:.2f}"


def _by_stage(numbers: Sequence[int]) -> str:
    """Every stage's number, or the range of them where there are many stages."""
    if len(set(numbers)) == 1:
        return str(numbers[0])
    if len(numbers) <= 8:
        return " ".join(map(str, numbers))
    return f"{numbers[0]} .. {numbers[-1]}"


def _profile(
    options: argparse.Namespace, interlock: InterlockConfig, contents: dict[str, Any], num_stages: int
) -> Profile:
    if options.profile:
        return Profile.load(options.profile)
    if not options.model:
        num_layers = options.bounds[-1] if options.bounds else _UNIT_LAYERS_PER_STAGE * num_stages
        return unit_profile(num_layers, num_layers / num_stages)
    terminal.print_progress("importing transformers")
    from ds_interlock.hf.model.pretrained import load_config
    from ds_interlock.hf.model.profile import estimate_profile

    return estimate_profile(
        options.model,
        load_config(options.model, trust_remote_code=options.trust_remote_code),
        interlock.head,
        micro_batch_size=micro_batch_size_of(contents),
        seq_length=options.seq_length,
        flops_per_second=options.tflops * 1e12,
        link=(options.latency * 1e-6, options.bandwidth * 1e9),
    )


def _micro_batches_of(contents: dict[str, Any]) -> int:
    value = contents.get("gradient_accumulation_steps")
    batch, micro = contents.get("train_batch_size"), contents.get("train_micro_batch_size_per_gpu")
    if value is None and isinstance(batch, int) and isinstance(micro, int):
        value = batch // micro  # one data-parallel replica
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"gradient_accumulation_steps: got {value!r}, set it or --micro-batches")
    return value


def _bounds(text: str) -> list[int]:
    try:
        bounds = [int(part) for part in text.split(",")]
    except ValueError:
        bounds = []
    if len(bounds) < 2 or bounds[0] != 0 or not rises(bounds):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected rising numbers from 0, like 0,4,8,12")
    return bounds
