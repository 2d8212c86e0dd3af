"""Runs programs on this stage: makes them, verifies them, and hands their actions to the interpreter."""

from collections.abc import Callable
from contextlib import nullcontext

from deepspeed.accelerator import get_accelerator

from ds_interlock.engine.data import TrainingData
from ds_interlock.engine.deepspeed_side import DeepSpeedSide
from ds_interlock.engine.instructions import InterlockSchedule
from ds_interlock.engine.timeline import Recorder
from ds_interlock.schedule import Program, evaluation_program, training_program, verify, verify_evaluation
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.backward import Backward
from ds_interlock.stage.interpreter import Interpreter
from ds_interlock.stage.work import StageWork
from ds_interlock.transport.links import Links
from ds_interlock.transport.ranks import StageRanks


class StageRunner:
    """What runs on this stage, one program after another. Every rank of the job must make one.

    Args:
        engine: Gives out the instructions of a schedule, which come back to ``interpreter``.
        ranks: This rank.
        data: What the first stage reads.
        backward: Where the gradients of training go.

    Attributes:
        interpreter: Of the program that is run, at most times that of training.
        recorder: Records times; its ``batch`` is the number of training batches so far.
        num_issued: Programs run so far, training and evaluation.
    """

    def __init__(
        self, engine: DeepSpeedSide, ranks: StageRanks, data: TrainingData, backward: Backward
    ) -> None:
        self._engine = engine
        self._module = engine.module
        self._ranks = ranks
        self._data = data
        self._backward = backward
        self.config = self._module.bound_config
        self.recorder = Recorder(get_accelerator().synchronize)
        self._links = Links(ranks.of_pipeline, ranks.stage, ranks.device, self.config.timeout_seconds)
        self.num_issued = self._num_flushed = 0
        self._schedules: dict[tuple[int, str, int], InterlockSchedule] = {}
        self.interpreter = self._interpreter(self.work_under(self._module.plan, backward))

    @property
    def work(self) -> StageWork:
        """The work of the program that is run, or was last."""
        return self.interpreter.work

    @property
    def has_unfinished_batches(self) -> bool:
        """Whether other stages may still wait for what this one has sent."""
        return self.num_issued != self._num_flushed

    def training_schedule(self, num_micro_batches: int, phase: int) -> InterlockSchedule:
        """What this stage does for a training batch in a phase.

        Raises:
            ScheduleError: If it could hang, or does not do what its plan says.
        """
        extra = self.config.extra_in_flight

        def make() -> Program:
            plan = self._module.schedule.phases[phase].plan
            program = training_program(plan, num_micro_batches, extra_in_flight=extra)
            verify(program, extra_in_flight=extra)
            return program

        return self._schedule((phase, "train", num_micro_batches), make)

    def evaluation_schedule(self, num_micro_batches: int, *, all_heads: bool) -> InterlockSchedule:
        """What this stage does for a batch of evaluation."""

        def make() -> Program:
            program = evaluation_program(self._module.plan, num_micro_batches, all_heads=all_heads)
            verify_evaluation(program, all_heads=all_heads)
            return program

        purpose = "all heads" if all_heads else "evaluate"
        return self._schedule((self._module.phase, purpose, num_micro_batches), make)

    def _schedule(self, key: tuple[int, str, int], make: Callable[[], Program]) -> InterlockSchedule:
        if key not in self._schedules:
            self._schedules[key] = InterlockSchedule(make(), self._ranks.stage)
        return self._schedules[key]

    def run(self, schedule: InterlockSchedule) -> StageWork:
        """Runs a batch of ``schedule``; returns the work, which has the losses."""
        self.interpreter.begin_batch(self.num_issued, schedule.micro_batches)
        self._engine._exec_schedule(schedule)
        self.num_issued += 1
        return self.interpreter.work

    def run_beside_training(self, program: Program, backward: Backward, *, record: bool) -> StageWork:
        """Runs a batch of a program of any plan, with gradients that do not go where those of training go."""
        interpreter = self._interpreter(self.work_under(program.plan, backward), record=record)
        training, self.interpreter = self.interpreter, interpreter
        try:
            return self.run(InterlockSchedule(program, self._ranks.stage))
        finally:
            self.interpreter = training

    def enter_phase(self, phase: int) -> None:
        """Turns to the plan of another phase."""
        self._links.flush()
        self.recorder.forget()  # a timeline is of one program
        self._module.phase = phase
        self.interpreter = self._interpreter(self.work_under(self._module.plan, self._backward))

    def flush(self) -> None:
        """Waits until the neighbours have everything that was sent."""
        self._links.flush()
        self._num_flushed = self.num_issued

    def close(self) -> None:
        """Ends the links."""
        self._links.close()

    def work_under(self, plan: GradientFlowPlan, backward: Backward) -> StageWork:
        """This stage's work under ``plan``, the one in force or another one for the same layers."""
        module, stage = self._module, self._ranks.stage
        return StageWork(
            plan,
            stage,
            module.run_layers,
            module.layer_parameters(),
            module.heads.by_loss(plan, stage),
            module.loss_fn,
            backward,
        )

    def _interpreter(self, work: StageWork, *, record: bool = True) -> Interpreter:
        return Interpreter(
            work,
            self._links,
            self._data.load,
            begin_micro_batch=self._module.begin_micro_batch,
            span=self.recorder.span if record else lambda action: nullcontext(),
        )
