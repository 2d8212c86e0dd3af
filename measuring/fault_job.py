"""The rank's side of ``measuring.faults``: a small training run, and what is done to it on the way.

A fault is one thing that goes wrong on one rank at one moment. ``train`` runs the whole job, or what is left
of it after its newest checkpoint, and gives a checksum of this rank's weights.
"""

import hashlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

import ds_interlock
from ds_interlock.engine.engine import InterlockEngine
from ds_interlock.engine.parameter_groups import UnusedHeads
from ds_interlock.engine.runner import StageRunner
from ds_interlock.schedule.action import Kind
from ds_interlock.stage.work import StageWork
from ds_interlock.transport.local_ranks import report

NUM_BATCHES, SAVES, EVALUATION, NEW_PHASE = 7, (2, 5), 3, 4
NUM_MICRO_BATCHES, NUM_LAYERS, WIDTH = 2, 6, 8
TIMEOUTS = {"timeout_seconds": 15.0, "setup_timeout_seconds": 30.0, "checkpoint_timeout_seconds": 20.0}
SECTIONS: dict[str, dict[str, Any]] = {
    "global": {"mode": "global"},
    "window 2": {"mode": "interlock", "window": 2},
    "schedule": {"schedule": [{"from_step": 0, "window": 1}, {"from_step": NEW_PHASE, "window": 2}]},
}
INJECTED = "injected fault"
_PHASES = {
    Kind.INPUT_GRADIENT: "relay",
    Kind.WEIGHT_GRADIENT: "weight gradient",
    Kind.BACKWARD: "weight gradient",
}
_SLOW_SECONDS = 2.0
_MOST_BYTES = 3000


@dataclass(frozen=True)
class Fault:
    """What goes wrong (``kind``), while the rank does what (``phase``), and in which batch, from 1."""

    kind: str
    phase: str
    rank: int
    batch: int


class _Data(Iterator[tuple[Tensor, Tensor]]):
    """Micro-batches without an end, each from a seed of its own."""

    def __init__(self, replica: int) -> None:
        self.position, self.replica = 0, replica

    def __next__(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.replica + self.position)
        self.position += 1
        return torch.randn(2, WIDTH, generator=generator), torch.randint(WIDTH, (2,), generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    """Replaced where the loss is what fails."""
    return nn.functional.cross_entropy(outputs, labels)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(torch.tanh(self.linear(hidden)))


def train(section: str, num_stages: int, folder: str, fault: Fault | None = None) -> str:
    """On a rank: trains to the end, from the newest checkpoint in ``folder``; a checksum of its weights."""
    ds_interlock.init_distributed(dist_backend="gloo")
    injection = _Injection(fault)
    with injection.patches():
        engine = _engine(section, num_stages, injection)
        data = _Data(engine.grid.get_data_parallel_rank())
        engine.set_dataiterator(data)
        if (Path(folder) / "latest").exists():
            engine.load_checkpoint(folder)
        while engine.global_steps < NUM_BATCHES:
            if not injection.leaves_out(engine.global_steps + 1):
                engine.train_batch()
            else:
                engine.global_steps += 1
            if engine.global_steps == EVALUATION:
                engine.eval_batch(_Data(9))
            if engine.global_steps in SAVES:
                engine.save_checkpoint(folder)
        engine.drain()
        weights = hashlib.sha256()
        for parameter in engine.module.parameters():
            weights.update(parameter.detach().numpy().tobytes())
        engine.destroy()
    return weights.hexdigest()


def _engine(section: str, num_stages: int, injection: "_Injection") -> Any:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "steps_per_print": None,
        "interlock": {**SECTIONS[section], **TIMEOUTS},
    }
    net = ds_interlock.InterlockPipelineModule(
        layers=[LayerSpec(_Block) for _ in range(NUM_LAYERS)],
        loss_fn=lambda outputs, labels: loss_fn(outputs, labels),
        num_stages=num_stages,
        partition_method="uniform",
        interlock=ds_interlock.InterlockConfig.from_deepspeed(config),
        head=lambda position: nn.Linear(WIDTH, WIDTH),
    )
    injection.at("start", 1)
    engine, *_ = ds_interlock.initialize(model=net, config=config)
    torch.manual_seed(900 + engine.global_rank)
    injection.engine = engine
    return engine


class _Injection:
    """Does ``fault`` on its rank, once; elsewhere nothing."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault = fault if fault and fault.rank == int(os.environ["RANK"]) else None
        self.engine: Any = None

    def leaves_out(self, batch: int) -> bool:
        """Whether this rank does not call ``train_batch`` this time."""
        return self._is_due("number of batches", "forward", batch)

    def at(self, phase: str, batch: int | None = None) -> None:
        """To be called when the rank is at ``phase``."""
        batch = self.engine._recorder.batch + 1 if batch is None else batch
        kind = self.fault.kind if self.fault else ""
        if kind in _DO and self._is_due(kind, phase, batch):
            _DO[kind](self.engine)

    def patches(self) -> Any:
        """Calls ``at`` from inside the engine, and makes losses, data and messages wrong."""
        before = self._before
        return _all_of(
            before(StageWork, "_forward", lambda *_: "forward" if torch.is_grad_enabled() else "evaluation"),
            before(StageWork, "run", lambda _, action: _PHASES.get(action.kind, "")),
            before(InterlockEngine, "_take_model_step", lambda *_: "step"),
            before(UnusedHeads, "drop_gradients", lambda *_: "gradient"),
            before(torch, "save", lambda *_: "saving"),
            before(StageRunner, "enter_phase", lambda *_: "change of phase"),
            before(InterlockEngine, "drain", lambda *_: "end" if self.is_at_end else ""),
            before(_Data, "__next__", lambda *_: "reading"),
            patch.object(StageWork, "output", self._output(StageWork.output)),
            patch(f"{__name__}.loss_fn", self._loss(loss_fn)),
        )

    @property
    def is_at_end(self) -> bool:
        """Whether all batches have been issued."""
        return bool(self.engine.global_steps == NUM_BATCHES)

    def _is_due(self, kind: str, phase: str, batch: int) -> bool:
        if self.fault != Fault(kind, phase, int(os.environ["RANK"]), batch):
            return False
        report(time.time())
        self.fault = None
        return True

    def _before(self, owner: Any, name: str, phase: Callable[..., str]) -> Any:
        """Makes the function ``name`` of ``owner`` call ``at`` first, with what ``phase`` says."""
        function = getattr(owner, name)

        def inside(*args: Any, **kwargs: Any) -> Any:
            if self.engine:
                self.at(phase(*args[:2]))
            return function(*args, **kwargs)

        return patch.object(owner, name, inside)

    def _output(self, output: Callable[..., Any]) -> Callable[..., Any]:
        def inside(work: StageWork, micro_batch: int) -> Any:
            hidden, labels = output(work, micro_batch)
            if torch.is_grad_enabled() and self._is_due("shapes", "forward", self.engine._recorder.batch + 1):
                hidden = hidden[..., :-1]
            return hidden, labels

        return inside

    def _loss(self, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inside(outputs: Tensor, labels: Tensor) -> Tensor:
            batch = self.engine._recorder.batch + 1
            if self._is_due("exception in the loss", "head", batch):
                raise RuntimeError(INJECTED)
            value = own(outputs, labels)
            if torch.is_grad_enabled() and self._is_due("nonfinite loss", "head", batch):
                return value * torch.nan
            return value

        return inside


@contextmanager
def _all_of(*patches: Any) -> Iterator[None]:
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def _raise(engine: Any) -> None:
    raise RuntimeError(INJECTED)


def _abort_connections(engine: Any) -> None:
    """Shuts down this process's connections to other ranks."""
    store = int(os.environ["MASTER_PORT"])
    for name in os.listdir("/proc/self/fd"):
        try:
            own = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # no socket
        with own:
            if own.family in (socket.AF_INET, socket.AF_INET6) and _peer_port(own) not in (None, store):
                own.shutdown(socket.SHUT_RDWR)


def _peer_port(own: socket.socket) -> int | None:
    try:
        return int(own.getpeername()[1])
    except OSError:
        return None


def _fill_disk(engine: Any) -> None:
    """No file may grow beyond a few KB from now on: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_BYTES, resource.RLIM_INFINITY))


def _poison_gradient(engine: Any) -> None:
    next(p.grad for p in engine.module.parameters() if p.grad is not None)[0] = torch.nan


_DO: dict[str, Callable[[Any], None]] = {
    "SIGKILL": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGSTOP": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "slow rank": lambda _: time.sleep(_SLOW_SECONDS),
    "exception": _raise,
    "exception in the data": _raise,
    "aborted connections": _abort_connections,
    "full disk": _fill_disk,
    "nonfinite gradient": _poison_gradient,
}
