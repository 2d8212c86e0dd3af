"""Runs programs on this stage: makes them, verifies them, and gives their actions to the interpreter."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from torch import Tensor
from torch.utils import _pytree

from ds_interlock.engine.data import TrainingData
from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.engine.instructions import InterlockSchedule
from ds_interlock.engine.timeline import Recorder
from ds_interlock.schedule import Program, evaluation_program, training_program
from ds_interlock.schedule.action import Kind
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.backward import Backward
from ds_interlock.stage.hidden import Hidden, copied
from ds_interlock.stage.interpreter import Interpreter
from ds_interlock.stage.shared_readout import SharedReadout
from ds_interlock.stage.work import StageWork
from ds_interlock.transport.copies import agree_on_copies
from ds_interlock.transport.links import Links
from ds_interlock.transport.ranks import StageRanks

Losses = Literal["final", "all", "none"]
"""Which losses an evaluation computes."""


def without_loss(program: Program, loss: int) -> Program:
    """An evaluation ``program`` that leaves out the head of ``loss``."""
    left_out = Kind.HEAD, (loss,)
    stages = (tuple(a for a in actions if (a.kind, a.losses) != left_out) for actions in program.stages)
    return replace(program, stages=tuple(stages))


class StageRunner:
    """What runs on this stage, one program after another. Every rank of a pipeline must make one.

    The engine gives out the instructions of a schedule, which come back to ``interpreter``.
    """

    def __init__(
        self, engine: DeepSpeedSide, ranks: StageRanks, data: TrainingData, backward: Backward
    ) -> None:
        self.engine = engine
        self.ranks = ranks
        self.data = data
        self.config = engine.module.interlock
        timers = engine.timers if engine.wall_clock_breakdown() else None
        self.recorder = Recorder(get_accelerator().synchronize, timers)
        self._backward = backward
        self.links = self._open_links()
        self._num_issued = self._num_flushed = 0  # programs, of training and evaluation
        self._schedules: dict[tuple[int, str, int], InterlockSchedule] = {}
        if engine.torch_autocast_enabled():
            self._autocast_heads()
        self.interpreter = self._interpreter(engine.module.plan, backward)

    @property
    def has_unfinished_batches(self) -> bool:
        """Whether other stages may still wait for what this one has sent."""
        return self._num_issued != self._num_flushed

    def training_schedule(self, num_micro_batches: int, phase: int) -> InterlockSchedule:
        """What this stage does for a training batch in a phase."""
        key, extra = (phase, "train", num_micro_batches), self.config.extra_in_flight
        if key not in self._schedules:
            plan = self.engine.module.schedule.phases[phase].plan
            program = training_program(plan, num_micro_batches, extra_in_flight=extra)
            self._schedules[key] = InterlockSchedule(program, self.ranks.stage)
        return self._schedules[key]

    def _evaluation_schedule(self, num_micro_batches: int, losses: Losses) -> InterlockSchedule:
        module = self.engine.module
        key = module.phase, losses, num_micro_batches
        if key not in self._schedules:
            program = evaluation_program(module.plan, num_micro_batches, all_heads=losses == "all")
            if losses == "none":
                program = without_loss(program, module.plan.final)
            self._schedules[key] = InterlockSchedule(program, self.ranks.stage)
        return self._schedules[key]

    def run(self, schedule: InterlockSchedule) -> StageWork:
        """Runs a batch of ``schedule``; returns the work, which has the losses."""
        self.interpreter.work.loss_fn = self.engine.module.loss_fn  # which scripts may replace
        self.links.expect(schedule.receive_ahead)
        self.interpreter.begin_batch(self._num_issued, schedule.micro_batches)
        self.engine._exec_schedule(schedule)
        self._num_issued += 1
        return self.interpreter.work

    def run_beside_training(self, program: Program, backward: Backward, *, record: bool) -> StageWork:
        """Runs a batch of a program of any plan, with gradients that do not go where those of training go."""
        training = self.interpreter
        self.interpreter = self._interpreter(program.plan, backward, record=record)
        try:
            return self.run(InterlockSchedule(program, self.ranks.stage))
        finally:
            self.interpreter = training

    def evaluate(
        self, data_iter: Iterator[Any], num_micro_batches: int, losses: Losses, *, keep_outputs: bool
    ) -> list[Hidden]:
        """Runs a batch without gradients; on the last stage returns its micro-batches' outputs, if kept."""
        engine = self.engine
        outputs: list[Hidden] = []
        engine.module.eval()
        training_data, engine.data_iterator = engine.data_iterator, data_iter
        if keep_outputs and self.ranks.is_last_stage:
            self.interpreter.outputs = outputs
        try:
            with torch.no_grad():
                self.run(self._evaluation_schedule(num_micro_batches, losses))
        finally:
            engine.data_iterator = training_data
            self.interpreter.outputs = None
        return outputs

    def mean_outputs(self, outputs: list[Hidden]) -> Any:
        """The mean over micro-batches and replicas: one number on all ranks, else on the last stage only."""
        mean: Any = None
        if self.ranks.is_last_stage:
            mean = _pytree.tree_map(lambda *each: sum(each) / len(each), *outputs)
            for tensor in _pytree.tree_leaves(mean):
                self.ranks.sum_over_replicas(tensor)
                tensor /= self.ranks.num_replicas
        number = mean.detach().reshape(()).float() if isinstance(mean, Tensor) and mean.numel() == 1 else None
        if self.ranks.from_last_stage(torch.tensor(float(number is not None), device=self.ranks.device)):
            return self.ranks.from_last_stage(number)
        return mean

    def check_walks(self, data_iter: Iterator[Any]) -> None:
        """Evaluates a micro-batch, and then does as ``InterlockPipelineModule.check_walks`` says."""
        work, starts = self.interpreter.work, list[Hidden]()

        def run_layers(hidden: Hidden, start: int, stop: int) -> Hidden:
            starts.append(copied(hidden) if not starts else None)
            return self._run_layers(hidden, start, stop)

        work.run_layers = run_layers
        try:
            self.evaluate(data_iter, 1, "none", keep_outputs=False)
        finally:
            work.run_layers = self._run_layers
        self.engine.module.train()
        self.engine.module.check_walks(starts[0])

    def evaluated_losses(self) -> Tensor:
        """Every head's mean loss in the batch just evaluated, in the plan's order, on all ranks."""
        engine, work = self.engine, self.interpreter.work
        losses = torch.zeros(len(work.plan.heads), device=self.ranks.device)
        for loss, value in self.ranks.average_over_replicas(work.mean_losses()).items():
            losses[loss] = value
        self.ranks.sum_over_pipeline(losses)
        if self.ranks.global_rank == 0 and engine.monitor.enabled:
            final = losses[work.plan.final].item()
            engine.monitor.write_events([("Train/Samples/eval_loss", final, engine.global_samples)])
        return losses

    def enter_phase(self, phase: int) -> None:
        """Turns to the plan of another phase."""
        self._flush_links()
        self.recorder.forget()  # a timeline is of one program
        self.engine.module.phase = phase
        self.interpreter = self._interpreter(self.engine.module.plan, self._backward)

    def flush(self) -> None:
        """Waits until the neighbours have everything that was sent."""
        self._flush_links()
        self._num_flushed = self._num_issued

    def renew_copies(self) -> None:
        """Before a training batch: what shared readouts of all stages have to do with it."""
        if (copies := self.engine.module.copies) is not None:
            copies.before_batch(self.engine.global_steps)

    def _flush_links(self) -> None:
        if (copies := self.engine.module.copies) is not None:
            copies.settle()  # or who has sent one would wait for it to be taken
        self.links.flush()

    def _open_links(self) -> Links:
        """Makes the links, with a channel for copies of the unembedding where heads read with such."""
        module, ranks, config = self.engine.module, self.ranks, self.config
        copy_links: Sequence[int] = ()
        if heads := module.schedule.heads:  # the same on all ranks
            copies = SharedReadout.copies_in(module.heads.values())
            first_stage = min(head.stage for head in heads)
            module.copies = agree_on_copies(
                ranks, copies, module.live_weights, module.stage_owner, first_stage
            )
            copy_links = () if module.copies is None else module.copies.stages[:-1]
        timeout, transport = config.timeout_seconds, config.transport
        links = Links(ranks.of_pipeline, ranks.stage, ranks.device, timeout, transport, copy_links)
        if module.copies is not None:
            module.copies.links = links
        return links

    def _interpreter(self, plan: GradientFlowPlan, backward: Backward, *, record: bool = True) -> Interpreter:
        """Does this stage's work under ``plan``, the one in force or another one for the same layers."""
        module, stage = self.engine.module, self.ranks.stage
        heads = module.heads.by_loss(plan, stage)
        parameters = module.layer_parameters(frozen=True)
        work = StageWork(plan, stage, self._run_layers, parameters, heads, module.loss_fn, backward)
        if module.interlock.head.needs_base and all(h.stage <= stage for h in module.schedule.heads):
            work.num_label_parts = 2  # no later head reads the base model's states
        return Interpreter(
            work,
            self.links,
            self.data.load,
            begin_micro_batch=module.begin_micro_batch,
            span=self.recorder.span if record else lambda action: nullcontext(),
        )

    def _run_layers(self, hidden: Hidden, start: int, stop: int) -> Hidden:
        with autocast_if_enabled(self.engine):
            return self.engine.module.run_layers(hidden, start, stop)

    def _autocast_heads(self) -> None:
        """Makes heads run under ``torch_autocast``, as the layers that they stand for do."""
        device, dtype = self.ranks.device.type, self.engine.torch_autocast_dtype()
        for head in self.engine.module.heads.values():
            for name in ("forward", "loss"):
                if hasattr(head, name):
                    setattr(head, name, torch.autocast(device, dtype)(getattr(head, name)))
