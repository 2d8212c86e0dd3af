"""What a verification compares with what, and how closely the two must agree."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor

from ds_interlock.config import InterlockConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.schedule.dependency import num_backward_passes
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.schedule.program import training_program
from ds_interlock.schedule.verify import verify as verify_program
from ds_interlock.stage.hidden import Hidden
from ds_interlock.stage.in_process import InProcessPipeline
from ds_interlock.stage.walks import compare_walks, modules_of
from ds_interlock.verification.job import Outcome, Run, run_job
from ds_interlock.verification.reference import (
    loss_fn,
    micro_batches,
    random_batches,
    small_model,
    stage_of,
    truncated_gradients,
)

FLOAT64_LIMIT = 1e-10
FLOAT32_LIMIT = 1e-5
"""Of float32 gradients through a few dozen operations; what is wrong is off by far more."""

NUM_MICRO_BATCHES = 4
OTHER_NUM_MICRO_BATCHES = (1, 2, 8)
NUM_BATCHES = 3
"""Batches of the runs that are compared after training: the stages stream over their borders."""


@dataclass(frozen=True)
class Check:
    """A comparison of ``num_parameters`` tensors: their ``worst_error``, and the largest allowed."""

    name: str
    num_parameters: int
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """False too if the error is not a number."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Report:
    """The results of a verification, for which ``num_programs`` were verified and run."""

    plan: GradientFlowPlan
    num_programs: int
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    """Where the verification is not the configuration to the letter."""

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return all(check.passed for check in self.checks)


def worst_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference between two sets of tensors, each relative to the largest entry expected.

    Infinite if one has a tensor that the other lacks, or of another shape; 0 only if all are equal.
    """
    if actual.keys() != expected.keys():
        return math.inf
    return max((_error(actual[name], expected[name]) for name in expected), default=math.inf)


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale else (math.inf if difference else 0.0)


def verify(
    interlock: InterlockConfig,
    plan: GradientFlowPlan,
    *,
    seed: int,
    timeout_seconds: float,
    device: str = "cpu",
    layers: Sequence[Any] = (),
    inputs: Hidden = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Runs ``plan``, that of ``interlock``, on a small model, each stage a process, and compares the results.

    The processes work on ``device``, "cpu" or "cuda", and may share one; the reference is always the CPU's.
    Of ``layers``, a model of the user's for a micro-batch of ``inputs``, the gradients of repeated backward
    passes are compared, if the plan repeats any. ``seed`` is that of weights and data. ``progress`` is
    called with a few words on what is done.

    Raises:
        ConfigError: If no heads can be built where the plan has them.
        ScheduleError: If a program is wrong or could come to a standstill.
        PeerError: If a process fails or the time is up.
    """
    interlock, notes = _repeatable(interlock, timeout_seconds)
    configured = Run(interlock, NUM_MICRO_BATCHES, NUM_BATCHES)
    comparisons = _comparisons(configured, plan)
    runs = list(dict.fromkeys([configured, *(run for c in comparisons for run in (c.actual, c.expected))]))
    programs = {_verified_program(run, plan.stage_bounds) for run in runs}
    progress("one process, float64")
    in_process, expected = gradients_in_process(interlock, plan, seed)
    how: dict[str, Any] = {"seed": seed, "timeout_seconds": timeout_seconds, "device": device}
    outcomes = run_job(plan.stage_bounds, runs, **how, progress=progress)
    checks = [
        _compare("one process, float64: gradients == autograd", in_process, expected, FLOAT64_LIMIT),
        *_checks_by_stage(plan, outcomes[configured].gradients, expected),
        *(comparison.check(outcomes) for comparison in comparisons),
        *_checks_by_layer(plan, layers, inputs),
    ]
    if plan.is_end_to_end:
        notes.append(
            "streaming on and off are the same thing here: no stage steps before the whole pipeline is done"
        )
    return Report(plan, len(programs), tuple(checks), tuple(notes))


def _verified_program(run: Run, stage_bounds: Sequence[int]) -> Program:
    """The program of ``run``; raises ScheduleError if it fails the verifier."""
    extra = run.interlock.extra_in_flight
    plan = run.interlock.plan(stage_bounds)
    program = training_program(plan, run.num_micro_batches, extra_in_flight=extra)
    verify_program(program, extra_in_flight=extra)
    return program


def gradients_in_process(
    interlock: InterlockConfig, plan: GradientFlowPlan, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of the first batch in float64: of ``InProcessPipeline``, and by plain autograd."""
    layers = small_model(plan.num_layers, seed)
    head = None if plan.is_end_to_end else head_factory(interlock.head, layers)
    net = InProcessPipeline(layers, loss_fn, plan, head).double()
    inputs, labels = random_batches(1, seed)[0]
    batch = inputs.double(), labels
    net.accumulate_gradients(micro_batches(batch, NUM_MICRO_BATCHES))
    actual = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return actual, truncated_gradients(net, batch)


def _repeatable(interlock: InterlockConfig, timeout_seconds: float) -> tuple[InterlockConfig, list[str]]:
    """The configuration without what makes losses random, and what was changed for that."""
    notes = []
    for key in ("token_fraction", "sequence_fraction"):
        if (fraction := getattr(interlock.head, key)) < 1:
            notes.append(f"interlock.head.{key} {fraction:g} makes the losses random: verified with 1")
    if interlock.head.type == "shared" and interlock.head.refresh_every > 1:
        every = f"interlock.head.refresh_every {interlock.head.refresh_every}"
        notes.append(f"{every} is more than these few batches show: verified with 1")
    if interlock.head.needs_base:
        notes.append("interlock.head.objective needs a base model: verified with the cross-entropy alone")
    plain: dict[str, object] = {"token_fraction": 1.0, "sequence_fraction": 1.0}
    plain |= {"warmup_steps": 0, "refresh_every": 1, "objective": "cross_entropy"}
    limit = min(interlock.timeout_seconds, timeout_seconds)
    return _changed(interlock, head=interlock.head.model_dump() | plain, timeout_seconds=limit), notes


def _changed(interlock: InterlockConfig, **keys: Any) -> InterlockConfig:
    return InterlockConfig.model_validate(interlock.model_dump() | keys)


# The processes' runs, and what is compared among them.


@dataclass(frozen=True)
class _Comparison:
    """Of the first batch's gradients to rounding, or of the whole training ``bit_for_bit``."""

    name: str
    actual: Run
    expected: Run
    bit_for_bit: bool

    def check(self, outcomes: Mapping[Run, Outcome]) -> Check:
        actual, expected = outcomes[self.actual], outcomes[self.expected]
        if not self.bit_for_bit:
            return _compare(self.name, actual.gradients, expected.gradients, FLOAT32_LIMIT)
        name = f"{self.name}: weights after {NUM_BATCHES} batches"
        check = _compare(name, actual.weights, expected.weights, 0.0)
        return check if torch.equal(actual.loss, expected.loss) else replace(check, error=math.inf)


def _comparisons(configured: Run, plan: GradientFlowPlan) -> list[_Comparison]:
    def changed(**keys: Any) -> Run:
        return replace(configured, interlock=_changed(configured.interlock, **keys))

    comparisons = []
    for num in OTHER_NUM_MICRO_BATCHES:
        name = f"gradients from {num} == from {NUM_MICRO_BATCHES} micro-batches"
        run = Run(configured.interlock, num, num_batches=1)
        comparisons.append(_Comparison(name, run, configured, bit_for_bit=False))
    if not plan.is_end_to_end:
        switched = changed(streaming=not configured.interlock.streaming)
        comparisons.append(_Comparison("streaming on == off", switched, configured, bit_for_bit=True))
    whole = changed(mode="interlock", window=plan.num_stages)
    ordinary = changed(mode="global", window=None)
    name = f"window {plan.num_stages} == global"
    return [*comparisons, _Comparison(name, whole, ordinary, bit_for_bit=True)]


def _checks_by_stage(
    plan: GradientFlowPlan, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> list[Check]:
    def part(gradients: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        return {name: value for name, value in gradients.items() if stage_of(plan, name) == stage}

    name = "processes, float32, stage {}: gradients == autograd"
    return [
        _compare(name.format(stage), part(actual, stage), part(expected, stage), FLOAT32_LIMIT)
        for stage in range(plan.num_stages)
    ]


def _checks_by_layer(plan: GradientFlowPlan, layers: Sequence[Any], hidden: Hidden) -> list[Check]:
    """Errors relative to what rounding may give."""
    checks = []
    if max(num_backward_passes(plan, stage) for stage in range(plan.num_stages)) > 1:
        for number, spec in enumerate(layers):
            layer = spec.build() if isinstance(spec, LayerSpec) else spec
            if isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None:
                layer = partial(spec.forward_fn, layer)
            modules = modules_of([layer])
            hidden, error, functions = compare_walks(layer, hidden, modules)
            kind = type(modules[0] if modules else layer).__name__ + (f", {functions}" if functions else "")
            num_parameters = sum(len(list(module.parameters())) for module in modules)
            name = f"layer {number} ({kind}): gradients of another walk == the first"
            checks.append(Check(name, num_parameters, error, 1.0))
    return checks


def _compare(name: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> Check:
    return Check(name, len(expected), worst_error(actual, expected), limit)
