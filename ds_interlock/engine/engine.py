"""``InterlockEngine``: DeepSpeed's pipeline engine, running a gradient-flow plan.

    train_batch ── DeepSpeed's loop over instructions ──┬─► interpreter       work, messages
                                                        ├─► reduce            losses, unused heads, DeepSpeed
                                                        └─► optimizer step    norm, DeepSpeed, report

``_train_schedule`` returns the program of this stage in DeepSpeed's own instructions, and
``_INSTRUCTION_MAP`` says what each one does here. Optimizer, ZeRO, data-parallel reduction, learning rates
and checkpoints of layers stay DeepSpeed's. What is new is in objects that the constructor makes.
"""

import atexit
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule as deepspeed_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch import distributed as dist

from ds_interlock.engine.checkpoint import Checkpoints
from ds_interlock.engine.data import TrainingData
from ds_interlock.engine.head_warmup import HeadWarmup
from ds_interlock.engine.instructions import INSTRUCTIONS, MESSAGE_TIMERS, InterlockSchedule
from ds_interlock.engine.mapped_checkpoint import DeepSpeedCheckpoint, OtherShape
from ds_interlock.engine.module import InterlockPipelineModule
from ds_interlock.engine.myopia import MyopiaMeter
from ds_interlock.engine.optimizer import StageOptimizer
from ds_interlock.engine.parameter_groups import UnusedHeads
from ds_interlock.engine.reports import COSINE, Progress, job_store
from ds_interlock.engine.runner import Losses, StageRunner
from ds_interlock.engine.timeline import Tracer, draw, gather
from ds_interlock.files import replace_text
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.plan import GradientFlowPlan, loss_name
from ds_interlock.schedule.simulate import Rows
from ds_interlock.stage.backward import Backward
from ds_interlock.transport.agreement import barrier
from ds_interlock.transport.failures import FailureLog, Sections, section
from ds_interlock.transport.host import to_device
from ds_interlock.transport.ranks import StageRanks

_TIMELINE = "timeline"


class InterlockEngine(PipelineEngine):
    """Trains an ``InterlockPipelineModule``. Made by ``ds_interlock.initialize``."""

    module: InterlockPipelineModule

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        immediate_bf16 = bool(self._config.bfloat16_config.immediate_grad_update)
        self._ranks = StageRanks(self.grid, self.device)
        config, log = self.module.interlock, FailureLog(job_store(), self._ranks.stage_of)
        self.sections = Sections(log, config.limits(self.num_stages), lambda: self._recorder.batch + 1)
        self._steps = StageOptimizer(self, self._ranks, immediate_bf16)
        self._unused_heads = UnusedHeads(self.module, self.optimizer, self.device)
        self._data = TrainingData(self, self._ranks)
        self._runner = StageRunner(self, self._ranks, self._data, Backward(self._steps.weight_pass))
        self._recorder = self._runner.recorder
        for phase in range(len(self.module.schedule.phases)):  # is refused now, if it could hang
            self._runner.training_schedule(self.micro_batches, phase)
        self._progress = Progress(self, self._ranks)
        trace, seconds = config.trace, config.timeout_seconds
        self._tracer = Tracer(trace, self._recorder, self._ranks, seconds) if trace else None
        self._warmup = HeadWarmup(self._runner)
        self._myopia = MyopiaMeter(self._runner)
        self._checkpoints = Checkpoints(self, self._ranks, self._data, config)
        self._at_exit = atexit.register(partial(_drain_at_exit, weakref.ref(self)))

    @property
    def plan(self) -> GradientFlowPlan:
        """The gradient-flow plan in force."""
        return self.module.plan

    @property
    def streaming(self) -> bool:
        """Whether a stage continues with the next batch while others still work on this one."""
        return self.module.interlock.streams(self.plan, tied=self.module.keeps_ties)

    @property
    def consumed_micro_batches(self) -> int:
        """Micro-batches read for training since the run began, by this rank (only stage 0 reads)."""
        return self._data.consumed

    def loss_name(self, loss: int) -> str:
        """What the loss with this index in ``plan.heads`` is called in reports."""
        return loss_name(self.plan, loss)

    def stage_losses(self) -> dict[str, float]:
        """On rank 0 the newest loss of every head that has arrived there, by name; elsewhere empty."""
        return self._progress.stage_losses()

    def gradient_cosines(self) -> dict[str, float]:
        """On rank 0 the newest result of ``interlock.myopia`` of every stage, by name; elsewhere empty."""
        return {f"stage_{stage}": value for stage, value in sorted(self._progress.cosines.items())}

    # Training.

    @section("step")
    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Trains on one batch: ``gradient_accumulation_steps()`` micro-batches.

        Args:
            data_iter: Iterator over ``(inputs, labels)``. Only stage 0 reads it.

        Returns:
            The newest final loss that has reached this stage, a float32 scalar: of this batch if stages
            do not stream, else of an earlier one, and nan before the first. ``drain`` returns the exact one.

        Raises:
            DataError: If the iterator ends within the batch.
            PeerError: If a neighbouring stage is gone, disagrees or does not answer in time.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() needs gradients enabled; use eval_batch() to evaluate")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.module.train()
        self._runner.renew_copies()
        self._warmup.before_batch()
        self._myopia.before_batch()
        self._run_training_batch(self._train_schedule())
        batch, loss = self._newest_final_loss()
        self._progress.write()
        self._progress.print_loss(self._recorder.batch - 1 - batch, loss)
        self._enter_phase()
        return loss

    @section("step")
    def fit_heads(self, data_iter: Iterator[Any] | None = None, num_steps: int = 1) -> dict[str, list[float]]:
        """Fits the auxiliary heads, of all phases, for some batches; weights and optimizer do not change.

        ``interlock.head.warmup_steps`` does this before the first training batch, unless it has been
        done by hand. All ranks must call it. Without auxiliary heads it does nothing, and reads no data.

        Args:
            data_iter: As for ``train_batch``.
            num_steps: Batches to read, of as many micro-batches as in training.

        Returns:
            The losses of this stage's heads, by name (see ``loss_name``), batch by batch.
        """
        return self._warmup.fit(data_iter, num_steps)

    @section("step")
    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
        return_head_losses: bool = False,
    ) -> Any:
        """Evaluates one batch, as DeepSpeed's ``eval_batch``. All ranks must call it.

        Args:
            data_iter: As for ``train_batch``.
            return_logits: Also return the outputs of the last micro-batch (None but on the last stage).
            compute_loss: If false, return the outputs of all micro-batches (None but on the last stage);
                no label is used, and labels may be None.
            reduce_output: ``"avg"``, the mean over micro-batches and replicas; DeepSpeed has no other.
            bcast_loss: Accepted for compatibility; every rank gets the loss.
            num_micro_batches: Micro-batches to read; by default as many as in training.
            return_head_losses: Also return every head's loss, by name (see ``loss_name``).

        Returns:
            The final loss, a float32 scalar, the same on every rank; a tuple if more is asked for. Without
            a ``loss_fn`` in its place the mean outputs, if they are no scalar on the last stage alone.
        """
        if compute_loss and reduce_output != "avg":
            raise NotImplementedError(f'reduce_output={reduce_output!r}: losses can only be averaged, "avg"')
        outputs_only = not compute_loss or (self.module.loss_fn is None and not return_head_losses)
        which: Losses = "none" if outputs_only else "all" if return_head_losses else "final"
        keep_outputs, count = return_logits or outputs_only, num_micro_batches or self.micro_batches
        outputs = self._runner.evaluate(data_iter, count, which, keep_outputs=keep_outputs)
        if not compute_loss:
            return outputs if self.is_last_stage() else None
        losses = None if outputs_only else self._runner.evaluated_losses()
        result = [self._runner.mean_outputs(outputs) if losses is None else losses[self.plan.final]]
        if return_logits:
            result.append(outputs[-1] if outputs else None)
        if losses is not None and return_head_losses:
            result.append({self.loss_name(index): value.item() for index, value in enumerate(losses)})
        return result[0] if len(result) == 1 else tuple(result)

    @section("step")
    def check_walks(self, data_iter: Iterator[Any]) -> None:
        """Refuses kernels that overwrite what they saved, if the plan walks back twice. For all ranks."""
        self._runner.check_walks(data_iter)

    @section("step")
    def global_gradients(self, data_iter: Iterator[Any]) -> dict[str, Tensor]:
        """This stage's gradients of a micro-batch, by name, as ``MyopiaMeter``. All ranks must call it."""
        return self._myopia.global_gradients(data_iter)

    @section("step")
    def drain(self) -> Tensor:
        """Waits until all stages have finished every issued batch, and checkpoints are written. Collective.

        Returns:
            The exact final loss of the last batch, a float32 scalar; nan before the first.
        """
        self._runner.flush()
        loss = self._ranks.from_last_stage(self._progress.final_loss)
        self._progress.reporter.flush()
        if self._tracer:
            self._tracer.flush()
        self._checkpoints.wait()
        barrier()
        if self.global_rank == 0:
            self._progress.reporter.flush()  # now that all ranks have posted
            self._progress.write()
        return loss

    def destroy(self) -> None:
        """Frees threads and connections. All ranks must call it, after ``drain``."""
        atexit.unregister(self._at_exit)
        self.sections.log.close()
        self._progress.close()  # threads first: they end even where the groups are gone
        if self._tracer:
            self._tracer.close()
        self._runner.links.close()
        super().destroy()

    # Timelines.

    def record_timeline(self) -> None:
        """Notes what this stage does when, in the batches until ``timeline`` is called."""
        self._recorder.start(_TIMELINE)

    def timeline(self) -> Rows:
        """What all stages did since ``record_timeline``: rows of spans. All ranks must call it."""
        return gather(self._recorder.stop(_TIMELINE), self.stage_id, self.num_stages)

    def write_timeline(self, path: str | os.PathLike[str]) -> None:
        """Writes a typical recorded batch and its simulation as an SVG. All ranks must call it."""
        rows = self.timeline()
        if self.global_rank == 0 and any(rows):  # a phase that begins after the last batch empties them
            replace_text(path, draw(self._train_schedule().program, rows, streaming=self.streaming))

    # Checkpoints.

    @section("checkpoint")
    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Saves everything a resumed run needs. As DeepSpeed's; all ranks must call it."""
        self.drain()
        tag = self._checkpoints.agreed_tag(tag)
        writes = (self.local_rank if self.use_node_local_storage() else self.global_rank) == 0
        with self._checkpoints.new(Path(save_dir), tag, writes=writes, save_latest=save_latest) as unfinished:
            super().save_checkpoint(
                str(save_dir), unfinished, client_state or {}, False, exclude_frozen_parameters
            )
        return True

    @section("checkpoint")
    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Loads a checkpoint. As DeepSpeed's; all ranks must call it.

        Another mode or size may have written it, or DeepSpeed, or a converter: heads it lacks start anew.

        Raises:
            ConfigError: If it is damaged, or lacks what this stage needs. Nothing has been loaded then.
        """
        if (folder := self._checkpoints.find(load_dir, tag)) is None:
            return None, None
        load = partial(
            super().load_checkpoint,
            str(load_dir),
            folder.name,
            load_module_strict,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
        kind = DeepSpeedCheckpoint if DeepSpeedCheckpoint.is_in(folder) else OtherShape
        if kind is OtherShape and not load_module_only and self._checkpoints.is_of_this_run(folder):
            result = self._checkpoints.load(folder, load, load_optimizer_states)
        else:
            wanted = folder, load_module_only, load_optimizer_states, load_lr_scheduler_states
            checkpoint = kind(self, self._checkpoints, *wanted)
            result = checkpoint.load(load, load_module_strict)
            self._warmup.is_due = checkpoint.has_new_heads
        self._enter_phase()  # that of the steps done when it was saved
        barrier()
        return result

    # What DeepSpeed calls.

    def _train_schedule(self) -> InterlockSchedule:
        return self._runner.training_schedule(self.micro_batches, self.module.phase)

    def _exec_action(self, buffer_id: int, action: Action, takes: tuple[Action, ...]) -> None:
        self._runner.interpreter.run(action, takes)

    def _exec_reduce_grads(self) -> None:
        self._steps.exercise_placeholder()
        if self.module.tied_comms:
            self._exec_reduce_tied_grads()
        with self._recorder.span(Action(self.stage_id, Kind.REDUCE, self.micro_batches)):
            super()._exec_reduce_grads()
        self._unused_heads.drop_gradients()
        self._progress.set_losses(self._runner.interpreter.work.mean_losses())

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        learning_rate = self.get_lr()[0]
        step = Action(self.stage_id, Kind.STEP, self.micro_batches)
        with self._recorder.span(step), self._steps.checked(self._progress.losses):
            super()._exec_optimizer_step(lr_kwargs)
        if self.wall_clock_breakdown() and self.global_steps % self.steps_per_print() == 0:
            self.timers.log(MESSAGE_TIMERS)
        values: dict[str, float | Tensor | None] = self._steps.reports() | {
            "learning_rate": learning_rate,
            "samples": self.global_samples,
            COSINE: self._myopia.take_cosine(),
        }
        self._progress.post(self._recorder.batch, values)

    def clip_fp32_gradients(self) -> None:
        """Clips by the norm of this stage's gradients, or of all that step together."""
        self._steps.clip(super().clip_fp32_gradients)

    def _reduce_non_expert_gradients(self, grads: Sequence[Tensor], elements_per_buffer: int) -> None:
        # One replica's are copied into a buffer and back: only another type, or a division, rounds them.
        alone = self._ranks.num_replicas == 1 and self.gradient_predivide_factor() == 1.0
        if not alone or any(getattr(g, "dtype", None) != self.communication_data_type for g in grads):
            super()._reduce_non_expert_gradients(grads, elements_per_buffer)

    _INSTRUCTION_MAP: Mapping[Any, Any] = {
        **PipelineEngine._INSTRUCTION_MAP,
        **dict.fromkeys(INSTRUCTIONS.values(), _exec_action),
        deepspeed_schedule.ReduceGrads: _exec_reduce_grads,
        deepspeed_schedule.OptimizerStep: _exec_optimizer_step,
    }

    def _run_training_batch(self, schedule: InterlockSchedule) -> None:
        if self._tracer:
            self._tracer.batch_begins(self._recorder.batch + 1)
        # Or DeepSpeed's hooks would take a backward pass that it has not started for the user's own.
        self._running_engine_backward = True
        try:
            self._runner.run(schedule)
        finally:
            self._running_engine_backward = False
        self._recorder.batch += 1
        if self._tracer:
            self._tracer.batch_is_done(self._recorder.batch, schedule.program, streaming=self.streaming)

    def _newest_final_loss(self) -> tuple[int, Tensor]:
        if not self.streaming:
            return self._recorder.batch - 1, self._ranks.from_last_stage(self._progress.final_loss)
        batch, loss = self._progress.reporter.newest
        return batch, to_device(torch.tensor(loss), self.device)

    def _enter_phase(self) -> None:
        """Puts the plan into force that the schedule has for the steps done."""
        if (phase := self.module.schedule.phase_at(self.global_steps)) != self.module.phase:
            self._runner.enter_phase(phase)
            self._steps.enter_phase()


def _drain_at_exit(reference: "weakref.ref[InterlockEngine]") -> None:
    """Drains for scripts that do not, as neighbours need what was sent. Tells of an error in the script."""
    engine = reference()
    if engine is None or engine.sections.has_failed or not dist.is_initialized():
        return
    if not engine.sections.tell(getattr(sys, "last_value", None)):
        engine._checkpoints.wait()
        if engine._runner.has_unfinished_batches:
            engine.drain()
