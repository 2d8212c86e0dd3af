"""``InterlockEngine``: DeepSpeed's pipeline engine, carrying out a gradient-flow plan.

``_train_schedule`` returns the program of this stage in DeepSpeed's own instructions, and
``_INSTRUCTION_MAP`` says what each one does here. The optimizer, ZeRO, the data-parallel reduction,
learning rates and checkpoints of layers stay DeepSpeed's.

Under local and interlock a stage steps as soon as its own gradients and the relays it owes are
done, and goes on with the next batch; nothing in ``train_batch`` waits for the whole pipe. Under
global it behaves as DeepSpeed's engine does, bit for bit.
"""

import atexit
import math
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch import distributed as dist

from ds_interlock.engine.checkpoint import CheckpointMixin
from ds_interlock.engine.evaluation import EvaluationMixin
from ds_interlock.engine.head_warmup import WarmHeadsMixin
from ds_interlock.engine.instructions import HeadPass, InterlockSchedule, RelayPass, WeightGradPass
from ds_interlock.engine.module import InterlockPipelineModule
from ds_interlock.engine.myopia import COSINE, MyopiaMixin
from ds_interlock.engine.optimizer import OptimizerMixin
from ds_interlock.engine.progress import ProgressMixin
from ds_interlock.engine.reports import BatchReport, Reporter
from ds_interlock.engine.timeline import Recorder, Rows, draw, gather
from ds_interlock.engine.trace import Tracer
from ds_interlock.engine.unused_heads import IdleHeadsMixin
from ds_interlock.errors import DataError
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.lower import evaluation_program, send_of, training_program
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.work import Gradients, StageWork
from ds_interlock.transport.links import Links

_TIMELINE = "timeline"


AnyStageWork = TypeVar("AnyStageWork", bound=StageWork)


class InterlockEngine(
    EvaluationMixin,
    OptimizerMixin,
    WarmHeadsMixin,
    IdleHeadsMixin,
    MyopiaMixin,
    ProgressMixin,
    CheckpointMixin,
    PipelineEngine,
):
    """Trains an ``InterlockPipelineModule``. Made by ``ds_interlock.initialize``."""

    module: InterlockPipelineModule

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        interlock = self.module.interlock
        assert interlock is not None, "initialize() binds the configuration before it makes the engine"
        self.interlock = interlock
        self._schedules: dict[tuple[str, int, int], InterlockSchedule] = {}
        self._work = self._work_of(self.plan, StageWork)
        self._skip_groups_of_idle_heads()
        self._links = Links(self.grid.pp_group, self.stage_id, self.device, interlock.timeout_seconds)
        self._gradients: dict[Action, Gradients] = {}
        self._outputs = None
        self._recorder = Recorder(get_accelerator().synchronize)
        posts = self.grid.get_data_parallel_rank() == 0 and self.grid.get_slice_parallel_rank() == 0
        who: dict[str, Any] = {"posts": posts, "collects": self.global_rank == 0}
        self._reporter = Reporter(self.stage_id, self.num_stages, **who)
        self._tracer: Tracer | None = None
        if interlock.trace is not None:
            who["timeout_seconds"] = interlock.timeout_seconds
            self._tracer = Tracer(interlock.trace, self._recorder, self.stage_id, self.num_stages, **who)
        self._stage_values = {}
        self._cosines = {}
        self._samples_ahead = []
        self._issued = self._drained = 0  # programs run, training and evaluation
        self._batches = 0  # training batches
        self._losses: dict[int, Tensor] = {}
        self._final_loss: Tensor | None = None
        self._gradient_norm: float | Tensor | None = None
        self._at_exit = partial(_drain_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    @property
    def plan(self) -> GradientFlowPlan:
        """The gradient-flow plan in force."""
        return self.module.plan

    @property
    def streaming(self) -> bool:
        """Whether a stage goes on to the next batch while others still work on this one."""
        return self.interlock.streams(self.plan, tied=self.module.keeps_ties)

    # Training.

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Trains on one batch: ``gradient_accumulation_steps()`` micro-batches.

        Args:
            data_iter: Iterator over ``(inputs, labels)``. Only stage 0 reads it.

        Returns:
            The newest final loss that has reached this stage, a float32 scalar: of this very batch
            if stages do not stream (``interlock.streaming`` false, or global mode), else of an
            earlier one, and nan before there is any. ``drain`` returns the exact one.

        Raises:
            DataError: If the iterator ends within the batch.
            PeerError: If a neighbouring stage is gone, disagrees or does not answer in time.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() needs gradients enabled; use eval_batch() to evaluate")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        if not self.module.training:
            self.module.train()
        self._warm_up_heads()
        self._measure_myopia()
        self._run_training_batch(self._train_schedule())
        batch, loss = self._newest_final_loss()
        self._write_reports()
        self._print_progress(batch, loss)
        self._enter_phase()
        return loss

    def _run_training_batch(self, schedule: InterlockSchedule) -> None:
        if self._tracer:
            self._tracer.batch_begins(self._batches + 1)
        with self._backward_passes():
            self._run(schedule)
        self._batches += 1
        if self._tracer:
            self._tracer.batch_is_done(self._batches, schedule.program, streaming=self.streaming)

    def drain(self) -> Tensor:
        """Waits until all stages have finished every issued batch. All ranks must call it.

        Returns:
            The exact final loss of the last batch, a float32 scalar; nan before the first.
        """
        self._links.flush()
        self._drained = self._issued
        loss = self._from_last_stage(self._final_loss)
        self._reporter.flush()
        if self._tracer:
            self._tracer.flush()
        dist.barrier()
        if self.global_rank == 0:
            self._reporter.flush()  # now that everybody has posted
            self._write_reports()
        return loss

    # Timelines.

    def record_timeline(self) -> None:
        """Notes what this stage does when, in the batches until ``timeline`` is called."""
        self._recorder.start(_TIMELINE)

    def timeline(self) -> Rows:
        """What all stages did since ``record_timeline``: rows of spans. All ranks must call it."""
        return gather(self._recorder.stop(_TIMELINE), self.stage_id, self.num_stages)

    def write_timeline(self, path: str | os.PathLike[str]) -> None:
        """Writes the newest recorded batch as an SVG, beside what the simulator makes of it.

        All ranks must call it; rank 0 writes.
        """
        rows = self.timeline()
        if self.global_rank == 0:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(draw(self._train_schedule().program, rows, streaming=self.streaming))

    def destroy(self) -> None:
        """Frees threads, connections and DeepSpeed's own. All ranks must call it, after ``drain``."""
        atexit.unregister(self._at_exit)
        self._links.close()
        self._reporter.close()
        if self._tracer:
            self._tracer.close()
        super().destroy()

    # DeepSpeed's seams.

    def _train_schedule(self) -> InterlockSchedule:
        return self._schedule("train", self.micro_batches)

    def _evaluation_schedule(self, num_micro_batches: int, all_heads: bool) -> InterlockSchedule:
        return self._schedule("heads" if all_heads else "eval", num_micro_batches)

    def _schedule(self, purpose: str, num_micro_batches: int) -> InterlockSchedule:
        key = purpose, self.module.phase, num_micro_batches
        if key not in self._schedules:
            if purpose == "train":
                extra = self.interlock.extra_in_flight
                program = training_program(self.plan, num_micro_batches, extra_in_flight=extra)
            else:
                program = evaluation_program(self.plan, num_micro_batches, all_heads=purpose == "heads")
            self._schedules[key] = InterlockSchedule(program, self.stage_id)
        return self._schedules[key]

    def _work_of(self, plan: GradientFlowPlan, kind: type[AnyStageWork]) -> AnyStageWork:
        """This stage's work under ``plan``, the one in force or another one for the same layers."""
        return kind(
            plan,
            self.stage_id,
            self.module.run_layers,
            self.module.layer_parameters(),
            self.module.heads_of(plan),
            self.module.loss_fn,
            self._weight_pass,
        )

    def _enter_phase(self) -> None:
        """Puts the plan into force that the schedule has for the steps done: every stage can count them."""
        phase = self.module.schedule.phase_at(self.global_steps)
        if phase == self.module.phase:
            return
        self._links.flush()
        self._recorder.forget()  # a timeline is of one program
        self.module.phase = phase
        self._work = self._work_of(self.plan, StageWork)
        self._norm_over_what_steps_together()

    def _run(self, schedule: InterlockSchedule) -> None:
        self._work.begin_batch(schedule.micro_batches)
        self._gradients.clear()
        self._exec_schedule(schedule)
        self._issued += 1

    def _exec_load_micro_batch(self, buffer_id: int, action: Action) -> None:
        batch = self._next_batch()
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DataError(
                f"the data iterator gave {type(batch).__name__} where a pair (inputs, labels) was expected; "
                "both may be a tensor or a tuple of tensors"
            )
        inputs, labels = (_to_device(part, self.device) for part in batch)
        self.module.begin_micro_batch()
        self._work.feed(action.micro_batch, inputs, labels)

    def _next_batch(self) -> Any:
        if self._samples_ahead:
            return self._samples_ahead.pop()
        if self.data_iterator is None:
            raise DataError(
                "stage 0 has no data: pass data_iter to train_batch, or training_data to initialize"
            )
        try:
            batch = next(self.data_iterator)
        except StopIteration:
            raise DataError(
                f"the data iterator ended in the middle of a batch: a batch takes {self.micro_batches} "
                "micro-batches (gradient_accumulation_steps). Wrap the loader in "
                "deepspeed.utils.RepeatingLoader, or stop after the last whole batch"
            ) from None
        self._consumed += 1 if self.module.training else 0
        return self.batch_fn(batch) if self.batch_fn else batch

    def _exec_post_receive(self, buffer_id: int, action: Action) -> None:
        self._links.post(action, self._issued)

    def _exec_send_forward(self, buffer_id: int, action: Action) -> None:
        hidden, labels = self._work.output(action.micro_batch)
        self._links.send(action, self._issued, hidden, labels)

    def _exec_send_gradient(self, buffer_id: int, action: Action) -> None:
        self._links.send(action, self._issued, self._gradients.pop(action))

    def _exec_work(self, buffer_id: int, action: Action, takes: tuple[Action, ...]) -> None:
        for receive in takes:
            self._take(receive)
        with self._recorder.span(action, self._batches):
            gradients = self._work.run(action)
        if gradients is not None:
            send = send_of(self._work.plan, action)
            assert send is not None, "gradients are made to be sent"
            self._gradients[send] = gradients
        if (
            self._outputs is not None
            and self.is_last_stage()
            and action.kind is Kind.FORWARD
            and not action.losses
        ):
            self._outputs.append(self._work.output(action.micro_batch)[0])

    def _take(self, receive: Action) -> None:
        structures = self._links.take(receive)
        if receive.kind is Kind.RECV_FORWARD:
            self.module.begin_micro_batch()
            self._work.feed(receive.micro_batch, *structures)
        else:
            self._work.feed_gradient(receive.micro_batch, receive.losses, structures[0])

    def _exec_reduce_grads(self) -> None:
        self._exercise_placeholder()
        if self.module.tied_comms:
            self._exec_reduce_tied_grads()
        super()._exec_reduce_grads()
        self._drop_gradients_of_idle_heads()
        self._losses = self._average_over_replicas(self._work.mean_losses())
        self._final_loss = self._losses.get(self.plan.final)

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        learning_rate = self.get_lr()[0]
        self._gradient_norm = self._stage_gradient_norm()
        with self._recorder.span(Action(self.stage_id, Kind.STEP, self.micro_batches), self._batches):
            super()._exec_optimizer_step(lr_kwargs)
        if self._gradient_norm is None:
            self._gradient_norm = getattr(self.optimizer, "_global_grad_norm", None)
        values: dict[str, float | Tensor | None] = {
            **{self.loss_name(loss): value for loss, value in self._losses.items()},
            "gradient_norm": self._gradient_norm,
            "learning_rate": learning_rate,
            "samples": self.global_samples,
            COSINE: self._take_cosine(),
        }
        self._reporter.post(BatchReport(self._batches, values, self._final_loss))

    # Losses and reports.

    def _average_over_replicas(self, losses: dict[int, Tensor]) -> dict[int, Tensor]:
        """Float32 scalars; a collective over the data-parallel replicas of this stage only."""
        if not losses:
            return {}
        values = torch.stack([value.detach().reshape(()) for value in losses.values()]).float()
        if self.is_data_parallel:
            dist.all_reduce(values, group=self.grid.get_data_parallel_group())
            values /= self.dp_world_size
        return dict(zip(losses, values.unbind(), strict=True))

    def _newest_final_loss(self) -> tuple[int, Tensor]:
        """The newest final loss that is known here, and of which batch it is."""
        if not self.streaming:
            return self._batches - 1, self._from_last_stage(self._final_loss)
        batch, loss = self._reporter.newest()
        return batch, torch.tensor(loss, device=self.device)

    def _from_last_stage(self, value: Tensor | None) -> Tensor:
        """The last stage's ``value``, on all stages. A collective over the pipe."""
        shared = torch.full((), math.nan, device=self.device) if value is None else value.clone()
        if self.is_pipe_parallel:
            dist.broadcast(shared, self._loss_stage_global_rank(), group=self.grid.get_pipe_parallel_group())
        return shared

    _INSTRUCTION_MAP: Mapping[Any, Any] = {
        **PipelineEngine._INSTRUCTION_MAP,
        deepspeed_schedule.LoadMicroBatch: _exec_load_micro_batch,
        deepspeed_schedule.RecvActivation: _exec_post_receive,
        deepspeed_schedule.RecvGrad: _exec_post_receive,
        deepspeed_schedule.SendActivation: _exec_send_forward,
        deepspeed_schedule.SendGrad: _exec_send_gradient,
        deepspeed_schedule.ForwardPass: _exec_work,
        deepspeed_schedule.BackwardPass: _exec_work,
        HeadPass: _exec_work,
        RelayPass: _exec_work,
        WeightGradPass: _exec_work,
        deepspeed_schedule.ReduceGrads: _exec_reduce_grads,
        deepspeed_schedule.OptimizerStep: _exec_optimizer_step,
    }


def _to_device(part: Any, device: torch.device) -> Any:
    """A tensor, a tuple of tensors, or None, on ``device``."""
    if part is None or isinstance(part, Tensor):
        return part if part is None else part.detach().to(device)
    if isinstance(part, tuple | list) and all(isinstance(item, Tensor) for item in part):
        return tuple(item.detach().to(device) for item in part)
    raise DataError(
        f"inputs and labels must each be a tensor or a tuple of tensors, got {type(part).__name__}"
    )


def _drain_at_exit(reference: "weakref.ref[InterlockEngine]") -> None:
    """A stage that is done early must not leave before its neighbours have what it sent them.

    Scripts written for DeepSpeed do not call ``drain``. After an error nobody waits.
    """
    engine = reference()
    failed = getattr(sys, "last_value", None) is not None
    if engine is not None and not failed and dist.is_initialized() and engine._drained != engine._issued:
        engine.drain()
