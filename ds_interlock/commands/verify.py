"""``ds-interlock verify``: a config's gradients on a small model against plain autograd."""

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ds_interlock.commands import terminal
from ds_interlock.commands.terminal import at_least_one, positive, print_progress
from ds_interlock.config import InterlockConfig, check_deepspeed, read_deepspeed
from ds_interlock.errors import ConfigError
from ds_interlock.schedule.picture import draw_plan

if TYPE_CHECKING:
    from ds_interlock.verification.checks import Report

_VERIFY = """\
Runs the plan of CONFIG's "interlock" section (mode, window, combine, head_stride, head, ...) on a small
random model, with the real engine in as many processes as there are stages. A program that is wrong or
could come to a standstill is refused before it runs. Then it compares:

  - the gradient of every parameter, layers and heads, with float64 autograd on truncated graphs;
  - the gradients of the same samples in other numbers of micro-batches;
  - training with streaming on and off, bit for bit;
  - a window as long as the pipeline with ordinary backpropagation, bit for bit;
  - with --layers-from, and where CONFIG has stages relay: each layer's gradients from one backward pass with
    those of another. Fused kernels that overwrite what they saved fail.

Of a schedule every phase is checked by itself. The rest of CONFIG (optimizer, batch sizes, clipping,
precision) is ignored: gradients are compared before any of it applies. No launcher and no GPU are needed.
With --device cuda the processes use the GPUs here, over CONFIG's "interlock.transport".
"""


def add_parser(commands: Any) -> None:
    """Adds ``verify`` to the subcommands."""
    summary = "check a config's gradients on a small model against plain autograd"
    add = terminal.add_command(commands, "verify", run, summary=summary, description=_VERIFY).add_argument
    add("config", metavar="CONFIG", help="DeepSpeed JSON config")
    stages = "stages, and processes (default: %(default)s)"
    add("--stages", type=at_least_one, default=4, metavar="K", help=stages)
    layers = "layers of the small model (default: 2 K + 1, room for a head within every stage)"
    add("--layers", type=at_least_one, metavar="L", help=layers)
    source = "function that returns (layers, inputs): your layers, and one micro-batch of inputs for them"
    add("--layers-from", metavar="MODULE:FUNCTION", help=source)
    add("--seed", type=int, default=0, metavar="S", help="of weights and data (default: %(default)s)")
    device = "of the processes (default: %(default)s)"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=device)
    timeout = "give up after this long (default: %(default)g)"
    add("--timeout", type=positive, default=300.0, metavar="SECONDS", help=timeout)
    add("--json", action="store_true", help="print JSON instead of a picture and a table")


def run(options: argparse.Namespace) -> int:
    """Runs the checks and reports on them; 0 if all passed."""
    contents = read_deepspeed(options.config)
    interlock = InterlockConfig.from_deepspeed(options.config)
    check_deepspeed(contents)
    num_layers = options.layers or 2 * options.stages + 1
    schedule = interlock.plan_schedule(_uniform_bounds(num_layers, options.stages))
    # Here the model runs on the CPU, whatever else there is. DeepSpeed looks when it is imported.
    os.environ["DS_ACCELERATOR"] = "cpu"
    print_progress("importing DeepSpeed")
    from ds_interlock.verification.checks import verify

    how: dict[str, Any] = {"seed": options.seed, "timeout_seconds": options.timeout}
    how |= {"device": options.device, "progress": print_progress}
    if options.layers_from:
        how["layers"], how["inputs"] = _function(options.layers_from)()
    reports = [
        verify(section, phase.plan, **how)
        for phase, (_, section) in zip(schedule.phases, interlock.phases, strict=True)
    ]
    if options.json:
        terminal.print_json(interlock, [_as_json(report) for report in reports])
    else:
        for (step, _), report in zip(interlock.phases, reports, strict=True):
            if interlock.schedule is not None:
                print(f"From step {step}:\n")
            _print_report(report)
    return 0 if all(report.passed for report in reports) else 1


def _function(text: str) -> Callable[[], Any]:
    module, _, name = text.partition(":")
    sys.path.insert(0, "")  # the working folder, as under `python -m`
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        expected = "expected MODULE:FUNCTION, as model:make_layers"
        raise ConfigError(f"--layers-from {text}: {expected} ({error})") from None
    return function


def _uniform_bounds(num_layers: int, num_stages: int) -> list[int]:
    """Stages as even as can be, the first ones a layer longer, as DeepSpeed cuts "uniform"."""
    if num_stages > num_layers:
        raise ConfigError(f"{num_stages} stages for {num_layers} layers: every stage needs at least one")
    each, longer = divmod(num_layers, num_stages)
    return [stage * each + min(stage, longer) for stage in range(num_stages + 1)]


def _print_report(report: "Report") -> None:
    print(draw_plan(report.plan), end="\n\n")
    rows = []
    for check in report.checks:
        limit = f"{check.limit:.0e}" if check.limit else "none"
        result = "pass" if check.passed else "FAIL"
        rows.append((check.name, str(check.num_parameters), f"{check.error:.1e}", limit, result))
    terminal.print_table(("check", "parameters", "worst error", "limit", "result"), rows)
    print()
    for note in report.notes:
        print(f"note: {note}")
    print(f"{report.num_programs} programs verified: all work in order, no standstill")
    num_failed, total = sum(not check.passed for check in report.checks), f"{len(report.checks)} checks"
    print(f"{num_failed} of {total} failed" if num_failed else f"all {total} passed")


def _as_json(report: "Report") -> dict[str, Any]:
    """What ``--json`` prints. An error that is no number is null: JSON has no infinity."""
    return {
        "passed": report.passed,
        "plan": {
            "stage_bounds": list(report.plan.stage_bounds),
            "heads": [vars(head) for head in report.plan.heads],
            "trained_by": [sorted(losses) for losses in report.plan.trained_by],
        },
        "num_programs_verified": report.num_programs,
        "checks": [
            vars(check)
            | {"error": check.error if math.isfinite(check.error) else None, "passed": check.passed}
            for check in report.checks
        ],
        "notes": list(report.notes),
    }
