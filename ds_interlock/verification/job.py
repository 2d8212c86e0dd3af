"""The processes of a verification: each stage of the small model on a rank of its own.

Every rank runs all runs of a job with the real engine, one after the other.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ds_interlock
from ds_interlock.config import InterlockConfig
from ds_interlock.config.parts import SECTION
from ds_interlock.errors import PeerError
from ds_interlock.transport.local_ranks import RankError, report, run_local_ranks
from ds_interlock.transport.start import backend_of
from ds_interlock.verification.reference import (
    NUM_SAMPLES,
    loss_fn,
    micro_batches,
    random_batches,
    small_model,
)

_LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Run:
    """One training of the small model, always from the same weights on the same samples."""

    interlock: InterlockConfig
    num_micro_batches: int
    num_batches: int


@dataclass(frozen=True)
class Outcome:
    """What one run gave: on a rank, of its stage; put together, of the whole model."""

    gradients: dict[str, Tensor]
    """Of the first batch, by parameter name."""
    weights: dict[str, Tensor]
    """After the last batch, by parameter name."""
    loss: Tensor
    """The final loss of the last batch."""


def run_job(
    stage_bounds: Sequence[int],
    runs: Sequence[Run],
    *,
    seed: int,
    timeout_seconds: float,
    device: str,
    progress: Callable[[str], None],
) -> dict[Run, Outcome]:
    """Trains the small model in as many processes as there are stages, one run after the other.

    The runs have the same ``interlock.transport``.
    """
    num_stages, num_done = len(stage_bounds) - 1, 0

    def on_report(number: int) -> None:
        nonlocal num_done
        num_done = number
        progress(f"processes ({num_stages}): {number} of {len(runs)} runs done")

    progress(f"processes ({num_stages}): starting; this takes some seconds")
    # DeepSpeed looks when it is imported, in each process.
    os.environ["DS_ACCELERATOR"] = device
    backend = "gloo" if device == "cpu" else backend_of(runs[0].interlock.transport)
    work = partial(_run_all, tuple(runs), tuple(stage_bounds), seed, backend, timeout_seconds)
    try:
        parts = run_local_ranks(
            work, num_stages, device=device, timeout_seconds=timeout_seconds, on_report=on_report
        )
    except TimeoutError as error:
        raise PeerError(
            f"{num_done} of {len(runs)} runs in {num_stages} processes were finished after "
            f"{timeout_seconds:g} seconds; allow more with --timeout, or use fewer --stages\n{error}"
        ) from None
    except RankError as error:
        reasons = [f"  rank {rank}: {failure.reason}" for rank, failure in sorted(error.failures.items())]
        raise PeerError("\n".join(["the processes could not run the plan", *reasons])) from error
    return {run: _put_together(of_run) for run, *of_run in zip(runs, *parts, strict=True)}


def _put_together(parts: Sequence[Outcome]) -> Outcome:
    """The outcome of the whole model: each parameter belongs to one stage."""
    gradients = {name: value for part in parts for name, value in part.gradients.items()}
    weights = {name: value for part in parts for name, value in part.weights.items()}
    return Outcome(gradients, weights, parts[-1].loss)


# On the ranks.


def _run_all(
    runs: Sequence[Run],
    stage_bounds: tuple[int, ...],
    seed: int,
    backend: str | None,
    timeout_seconds: float,
) -> list[Outcome]:
    ds_interlock.init_distributed(backend, timeout=timedelta(seconds=timeout_seconds))
    outcomes = []
    for run in runs:
        outcomes.append(_train(run, stage_bounds, seed))
        if torch.distributed.get_rank() == 0:
            report(len(outcomes))
    return outcomes


def _train(run: Run, stage_bounds: tuple[int, ...], seed: int) -> Outcome:
    net = ds_interlock.InterlockPipelineModule(
        small_model(stage_bounds[-1], seed),
        interlock=run.interlock,
        loss_fn=loss_fn,
        num_stages=len(stage_bounds) - 1,
        stage_bounds=stage_bounds,
    )
    # Plain SGD: weights then differ wherever gradients do. DeepSpeed clips by default, before the hook below.
    config = {
        "train_micro_batch_size_per_gpu": NUM_SAMPLES // run.num_micro_batches,
        "gradient_accumulation_steps": run.num_micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "optimizer": {"type": "SGD", "params": {"lr": _LEARNING_RATE}},
        SECTION: run.interlock.model_dump(),
    }
    engine, optimizer, *_ = ds_interlock.initialize(model=net, config=config)
    parameters = dict(net.named_parameters())
    gradients: dict[str, Tensor] = {}

    def keep_first_gradients(*_: Any) -> None:
        if not gradients:
            for name, p in parameters.items():
                if not p.requires_grad:
                    continue
                gradients[name] = (torch.zeros_like(p) if p.grad is None else p.grad).detach().cpu().clone()

    optimizer.register_step_pre_hook(keep_first_gradients)
    batches = random_batches(run.num_batches, seed)
    data = iter([part for batch in batches for part in micro_batches(batch, run.num_micro_batches)])
    for _ in range(run.num_batches):
        engine.train_batch(data)
    loss = engine.drain().cpu()
    weights = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    engine.destroy()
    return Outcome(gradients, weights, loss)
