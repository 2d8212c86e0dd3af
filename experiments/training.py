"""One run: a model trained in one mode from one seed, all stages in one process, and its measurements.

The learning rate stays constant, and the model that is evaluated is the average of the weights so far, in
which step s of t has a weight that rises as s**8: about the last ninth of the run, whatever its length. So
the curve of losses shows what every shorter budget would have given, which a curve under a decaying
learning rate does not.

Source: Shamir, Zhang: Stochastic Gradient Descent for Non-smooth Optimization: Convergence Results and
Optimal Averaging Schemes, 2013, section 4 (polynomial-decay averaging).
"""

import copy
import math
import time
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from ds_interlock.errors import ConfigError, DataError
from ds_interlock.files import unfinished_file
from ds_interlock.heads.factory import block_parameters
from ds_interlock.stage.in_process import InProcessPipeline, MicroBatch
from ds_interlock.stage.myopia import gradient_cosines
from experiments.asynchronous import StaleWeights, delays
from experiments.definition import Run
from experiments.tasks import Task, make_task
from measuring.results import machine, versions
from measuring.results_file import Record

_ETA = 8
"""The power that weights in the average rise with."""

_NUM_BATCH_NORM_STEPS = 20
"""The last steps before an evaluation, whose batches give batch norm its statistics."""


def train(run: Run, checkpoint: Path | None, device: str = "cpu", seconds_left: float = math.inf) -> Record:
    """Trains, or resumes from ``checkpoint``, a file that the caller removes.

    Args:
        run: What to do.
        checkpoint: Where to save at every evaluation; None to save nothing.
        device: Where to compute.
        seconds_left: After so many seconds no batch is begun: the run is evaluated where it is.

    Returns:
        A line for the results file. If the time was up, its "stopped_after" are the steps done.

    Raises:
        DataError: If data is missing, or the checkpoint belongs to another run.
        ConfigError: If the loss becomes nan.
    """
    deadline = time.monotonic() + seconds_left
    torch.manual_seed(run.seed)
    training = Training(run, device)
    if checkpoint is not None and checkpoint.exists():
        training.load(checkpoint)
    name = f"{run.mode}, seed {run.seed}"
    ends = (run.training.num_steps, run.num_steps)  # of the budget, of all
    with tqdm(total=run.num_steps, desc=name, unit="step", leave=False, disable=None) as bar:
        stopped = False
        while training.step < run.num_steps and not stopped:
            training.do_step()
            stopped = training.step < run.num_steps and time.monotonic() > deadline
            if stopped or training.step % run.measurements.evaluate_every == 0 or training.step in ends:
                bar.set_postfix_str(training.evaluate(final=stopped))
                if checkpoint is not None:
                    training.save(checkpoint)
                bar.update(training.step - bar.n)
    return {
        **training.numbers(),
        **({"stopped_after": training.step} if stopped else {}),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "machine": machine(),
        "versions": versions(),
    }


class Training:
    """The state of a run."""

    def __init__(self, run: Run, device: str) -> None:
        self.run, self.device = run, device
        self.task: Task = make_task(run)
        section = run.section
        self.model = nn.Sequential(*self.task.layers).to(device)
        schedule = section.plan_schedule(self.task.stage_bounds)
        net = InProcessPipeline(self.task.layers, self.task.loss_fn, schedule, self.task.heads(section))
        self.net = net.to(device)
        self.optimizer = _optimizer(run, self.net)
        of_stages = [work.parameters for work in self.net.stages]
        self.stale = StaleWeights(of_stages, delays(run.asynchronous, run.num_stages))
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, Any]] = []
        self.final: dict[str, float] = {}
        self._losses: list[Tensor] = []

    def do_step(self) -> None:
        """One batch."""
        started = time.perf_counter()
        self._set_learning_rate()
        self.net.change_plan(self.net.schedule.plan_at(self.step))
        with self._precision(), self.stale.in_force():
            losses = self.net.accumulate_gradients(self._batch(self.step))
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        take_in(self.average, self.model, self.step)
        self._losses.append(losses[self.net.plan.final].detach())
        self.step += 1
        self.seconds += time.perf_counter() - started

    def evaluate(self, *, final: bool = False) -> str:
        """Adds a point to the curve, and describes it in a line; ``final`` as at the end of the budget."""
        with self._precision():
            return self._evaluate(final or self.step == self.run.training.num_steps)

    def _evaluate(self, final: bool) -> str:
        measure = self.run.measurements
        started = time.perf_counter()
        train_loss = torch.stack(self._losses).mean().item()  # waits for the device
        self.seconds += time.perf_counter() - started
        self._losses.clear()
        point: dict[str, Any] = {"step": self.step, "train_loss": train_loss}
        is_measured = measure.cosines_every and not self.run.asynchronous
        if is_measured and self.step % measure.cosines_every == 0:
            cosines = gradient_cosines(self.net, self._batch(self.step))
            point["cosine"] = [None if math.isnan(cosine) else cosine for cosine in cosines]
        # Averaged weights have batch norm statistics of their own.
        last_steps = range(max(0, self.step - _NUM_BATCH_NORM_STEPS), self.step)
        update_bn((x for step in last_steps for x, _ in self._batch(step)), self.average)
        self.average.eval()
        score = self._score(measure.num_samples)
        point |= {**score, "stage_rms": self._stage_rms()}
        if final:
            self.final = self._score(measure.num_final_samples)
        if any(math.isnan(value) for value in score.values()):
            raise ConfigError(
                f"mode {self.run.mode}, seed {self.run.seed}: the loss is nan at step {self.step}; set a "
                "lower training.learning_rate in the experiment's file"
            )
        self.curve.append(point)
        return ", ".join(f"{name} {value:.4f}" for name, value in score.items())

    def _batch(self, step: int) -> list[MicroBatch]:
        batch = self.task.batch(step)
        if self.device == "cpu":
            return batch
        moved = ((x.pin_memory(), y.pin_memory()) for x, y in batch)  # so that nothing waits for the device
        return [tuple(t.to(self.device, non_blocking=True) for t in pair) for pair in moved]

    def _precision(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.run.training.dtype == "bfloat16")

    def _score(self, num_samples: int) -> dict[str, float]:
        batch_size = self.run.measurements.evaluation_batch_size
        return self.task.evaluate(self.average, num_samples, batch_size, self.device)

    @torch.no_grad()
    def _stage_rms(self) -> list[float]:
        """Root mean square of each stage's output but the last's, on some validation inputs."""
        hidden = self.task.probe().to(self.device)
        values = []
        for number, layer in enumerate(self.average, start=1):
            hidden = layer(hidden)
            if number in self.task.stage_bounds[1:-1]:
                values.append(hidden.square().mean().sqrt().item())
        return values

    def numbers(self) -> dict[str, Any]:
        """The run and its measurements, in JSON's types."""
        run = self.run.model_dump(mode="json")
        return {"run": run, "final": self.final, "curve": self.curve, "seconds": self.seconds}

    def save(self, path: Path) -> None:
        """Writes everything that the rest of the run depends on."""
        state = {
            **self.numbers(),
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "stale": self.stale.state(),
            "random": torch.get_rng_state(),
            "device_random": None if self.device == "cpu" else torch.cuda.get_rng_state(self.device),
            "step": self.step,
        }
        with unfinished_file(path) as draft:
            torch.save(state, draft)

    def load(self, path: Path) -> None:
        """Restores the state at which ``save`` was called."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        if not self._is_of(state["run"]):
            raise DataError(
                f"{path} is of another run of mode {self.run.mode}, seed {self.run.seed}: the experiment's "
                "file has changed since; remove the checkpoint to begin again"
            )
        self.net.change_plan(self.net.schedule.plan_at(max(state["step"] - 1, 0)))
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.stale.load(state["stale"])
        torch.set_rng_state(state["random"].cpu())
        if state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"].cpu(), self.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve, self.final = state["curve"], state["final"]

    def _is_of(self, run: dict[str, Any]) -> bool:
        """Whether this is the run of a checkpoint; keys that came later have their defaults in it."""
        try:
            return Run.model_validate(run) == self.run
        except ValidationError:
            return False

    def _set_learning_rate(self) -> None:
        warmup = self.run.training.warmup_steps
        share = min(1.0, (self.step + 1) / warmup) if warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak"]

    def _clip(self) -> None:
        """As in the engine: over the whole model in global mode; else each stage by itself, as none waits."""
        limit = self.run.training.max_gradient_norm
        if limit is None:
            return
        parameters = [
            [*work.parameters, *(p for head in work.heads.values() for p in head.parameters())]
            for work in self.net.stages
        ]
        if self.net.plan.is_end_to_end and not self.run.asynchronous:
            parameters = [list(chain.from_iterable(parameters))]
        for of_stage in parameters:
            nn.utils.clip_grad_norm_(of_stage, limit, foreach=True)


@torch.no_grad()
def take_in(average: nn.Module, model: nn.Module, num_averaged: int) -> None:
    """Takes the weights after one more step into their average; buffers are the model's.

    Like ``torch.optim.swa_utils.AveragedModel``, which counts on the device and waits for it in every step.
    """
    averaged, current = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(averaged, current, (_ETA + 1) / (num_averaged + 1 + _ETA))
    for of_average, of_model in zip(average.buffers(), model.buffers(), strict=True):
        of_average.copy_(of_model)


def _optimizer(run: Run, net: InProcessPipeline) -> torch.optim.Optimizer:
    rate, decay = run.training.learning_rate, run.training.weight_decay
    blocks = {p for head in net.heads.values() for p in block_parameters(head)}
    of_readouts = [p for p in net.heads.parameters() if p not in blocks]
    scale, ends_scale = run.section.head.learning_rate_scale, run.training.ends_rate_scale
    layers = nn.ModuleList(net.layers_in_order)
    of_ends = [*layers[:2].parameters(), *layers[-2:].parameters()] if ends_scale != 1 else []
    others = {*of_readouts, *of_ends}
    of_layers = [p for p in net.parameters() if p not in others]
    groups = [
        {"params": of_layers, "peak": rate},
        {"params": of_readouts, "peak": scale * rate},
        {"params": of_ends, "peak": ends_scale * rate},
    ]
    groups = [group for group in groups if group["params"]]
    if run.training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=decay, foreach=True)
    betas = run.training.betas
    if run.training.optimizer == "nadam":
        how = {"decoupled_weight_decay": True, "foreach": True}
        return torch.optim.NAdam(groups, lr=rate, betas=betas, weight_decay=decay, **how)
    how = {"foreach": True} if of_layers[0].device.type == "cpu" else {"fused": True}
    return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay, **how)
