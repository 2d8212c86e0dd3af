"""The ``"interlock"`` section of a DeepSpeed config: its keys, and what is wrong with it.

    configs/interlock.json                       InterlockConfig                 GradientFlowPlan
    {"train_batch_size": 32, ...    read,        mode, window, combine, ...      which loss trains
     "interlock": {"mode": ...,   ─────────►       head: HeadConfig     ──────►  which stage
       "head": {"type": ...}}}    from_deepspeed                        plan()

A config without the section is one for ordinary (``global``) backpropagation. The models below are the
only description of the section: ``reference.py`` makes ``docs/config.md`` of them.
"""

import os
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from ds_interlock.config import parts
from ds_interlock.config.deepspeed import read_deepspeed
from ds_interlock.config.faults import fault_of, misspelt_sections, shown_as_json
from ds_interlock.config.parts import DEFAULT_WINDOW, SECTION, Mode, PhaseConfig, Section, window_of
from ds_interlock.errors import ConfigError, PlanError, list_faults
from ds_interlock.schedule.phases import PlanSchedule, faults_of_steps
from ds_interlock.schedule.plan import Combine, GradientFlowPlan

_LENS_WARMUP_STEPS = 20

HeadType = Literal["auto", "linear", "norm_linear", "low_rank", "lens", "shared"]
Objective = Literal["cross_entropy", "kl", "reconstruction"]
_WEIGHTS = {"cross_entropy_weight": ("cross_entropy", 1.0), "kl_weight": ("kl", 0.0)}


class HeadConfig(Section):
    """How the auxiliary heads are built and weighted. The final loss is the model's own."""

    type: HeadType = "auto"
    """What a head is, if the module is given no `head` of its own. `auto`: `lens` for a pretrained model,
    otherwise `norm_linear`. `linear`: an unembedding. `norm_linear`: a norm of the model's kind, then an
    unembedding. `low_rank`: a norm, then an unembedding of rank `rank`. `lens`: a trainable affine
    translator, then a frozen copy of the model's own norm and unembedding. `shared`: a norm and a learned
    temperature, then a copy of the model's unembedding as it is trained. See docs/heads.md."""
    blocks: int | tuple[int, ...] = 0
    """More layers like the one before the head, at the beginning of a head of any type. A list is by stage,
    its last number for all stages that follow: `[2, 1]`. They start with the model's initial weights
    and learn at its rate."""
    translator: Literal["after_norm", "before_norm"] = "after_norm"
    """Where the translator of a `lens` is. `after_norm`: it folds into the unembedding, so that stages and
    head make a smaller model of the same architecture (it has a bias only if the model has one to fold it
    into). `before_norm`: as in the tuned lens."""
    objective: Objective | dict[Objective, float] = "cross_entropy"
    """What a head learns from, or an object of several with their factors: `{"cross_entropy": 1, "kl": 0.5}`.
    `cross_entropy`: the model's own loss, from the labels. `kl`: KL(base || head), the divergence of the
    head's outputs from those of the model before training; needs a `lens`. `reconstruction`: how far the
    hidden state that the head reads is from the one before training. The last two need what the fine-tuning
    job records. In evaluation a head's loss is the model's own. See docs/heads.md."""
    fused: bool = True
    """Compute unembedding and loss of a head in one, never holding all its logits, where the loss function
    has a method `fused_linear` and nothing follows the unembedding. The numbers are the same to rounding."""
    token_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the labelled positions, drawn at random in every micro-batch, on which a head computes its
    loss in training. Needs one label for each position, and a loss function that averages over positions
    without shifting the labels (shift them in the data). The final loss uses all."""
    sequence_fraction: float = Field(1.0, gt=0, le=1)
    """Share of a micro-batch's sequences, drawn at random and at least one, that a head reads in training:
    what makes `blocks` cheap, which need whole sequences. Needs labels with a row for each sequence, and a
    loss function that averages over them. The final loss uses all."""
    learning_rate_scale: float = Field(1.0, gt=0)
    """Learning rate of the heads' own parameters, but for `blocks`, as a multiple of the model's."""
    weight: float = Field(1.0, gt=0)
    """Factor of every auxiliary loss in the gradients it takes part in; the final loss has 1."""
    rank: int = Field(64, ge=1)
    """Rank of the unembedding of a `low_rank` head."""
    refresh_every: int = Field(20, ge=1)
    """Type `shared` only: every so many batches the last stage copies its unembedding for the heads, which
    read with this copy as many batches later. At least twice the number of stages, or stages may wait."""
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="Batches for which the heads alone are fitted before the first training batch of a new "
        f"run. If not given, {_LENS_WARMUP_STEPS} for `lens` and `shared` on a pretrained model, or 0.",
    )
    warmup_learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of these batches; their optimizer is AdamW without decay."""

    @field_validator("type", mode="before")
    @classmethod
    def _says_what_became_of_it(cls, kind: object) -> object:
        if kind == "block_linear":
            raise ValueError('got "block_linear", which is now type "norm_linear" with "blocks": 1')
        return kind

    @field_validator("blocks", mode="before")
    @classmethod
    def _a_number_or_a_list(cls, blocks: object) -> object:
        numbers = blocks if isinstance(blocks, list | tuple) else [blocks]
        if not numbers or any(type(number) is not int or number < 0 for number in numbers):
            expected = "a whole number, 0 or more, or a list of them, by stage"
            raise ValueError(f"got {shown_as_json(blocks)}, expected {expected}")
        return tuple(blocks) if isinstance(blocks, list) else blocks

    @model_validator(mode="before")
    @classmethod
    def _reads_the_keys_before_objective(cls, section: object) -> object:
        """``cross_entropy_weight`` and ``kl_weight``, which recorded results and older configs have."""
        if not isinstance(section, Mapping) or "objective" in section or not _WEIGHTS.keys() & section.keys():
            return section  # both forms at once: an unknown key
        factors = {name: section.get(key, default) for key, (name, default) in _WEIGHTS.items()}
        others = {key: value for key, value in section.items() if key not in _WEIGHTS}
        return {**others, "objective": {name: factor for name, factor in factors.items() if factor != 0}}

    @field_validator("objective", mode="before")
    @classmethod
    def _one_or_several(cls, objective: object, info: ValidationInfo) -> object:
        names = [*get_args(Objective)]
        factors: Any = {name: 1.0 for name in names if name == objective}
        if isinstance(objective, Mapping):
            factors = objective
        numbers = all(type(factor) in (int, float) and 0 < factor < inf for factor in factors.values())
        if not factors or not set(factors) <= set(names) or not numbers:
            known = ", ".join(map(shown_as_json, names[:-1])) + f" or {shown_as_json(names[-1])}"
            several = "or an object of them with factors above 0"
            raise ValueError(f"got {shown_as_json(objective)}, expected {known}, {several}")
        kind = info.data.get("type", "lens")  # missing if it is faulty itself
        if "kl" in factors and kind not in ("auto", "lens"):
            raise ValueError(
                f'got {shown_as_json(objective)}, but type is "{kind}": only a lens has the base model\'s '
                'unembedding; set type to "lens", or leave out "kl"'
            )
        if list(factors.values()) == [1]:
            return next(iter(factors))
        return {name: float(factors[name]) for name in names if name in factors}

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a mapping has no hash of its own

    @property
    def objectives(self) -> dict[Objective, float]:
        """What a head learns from, and the factor of each."""
        return self.objective if isinstance(self.objective, dict) else {self.objective: 1.0}

    @property
    def needs_base(self) -> bool:
        """Whether a head learns from the base model's hidden states."""
        return set(self.objectives) != {"cross_entropy"}

    def blocks_at(self, stage: int) -> int:
        """The number of blocks of a head in this stage."""
        by_stage = (self.blocks,) if isinstance(self.blocks, int) else self.blocks
        return by_stage[min(stage, len(by_stage) - 1)]

    def resolve(self, *, pretrained: bool) -> "HeadConfig":
        """This section with what is left open replaced by what it means for a model."""
        kind = ("lens" if pretrained else "norm_linear") if self.type == "auto" else self.type
        steps = self.warmup_steps
        if steps is None:
            # They read the middle of a trained model worse than chance until what they have has learned.
            steps = _LENS_WARMUP_STEPS if pretrained and kind in ("lens", "shared") else 0
        return self.model_copy(update={"type": kind, "warmup_steps": steps})


class InterlockConfig(Section):
    """The whole ``"interlock"`` section. Without arguments: ordinary backpropagation."""

    mode: Mode = "global"
    """`global`: ordinary backpropagation, DeepSpeed's own schedule and numbers. `local`: every stage is
    trained by the loss at its end. `interlock`: every loss reaches back over `window` stages."""
    window: float | None = Field(
        None,
        ge=1,
        validate_default=True,
        description="Mode `interlock` only: the number of stages one loss reaches back over, from 1 (as "
        f"`local`) to all (as `global`, and as one stage alone in any mode); {DEFAULT_WINDOW} if not given. "
        "A fraction moves the heads into the next stage: 1.25 puts them after a quarter of its layers.",
    )
    schedule: list[PhaseConfig] | None = None
    """In place of `mode` and `window`: a list of phases, as `[{"from_step": 0, "window": 1}, {"from_step":
    2000, "mode": "global"}]`; see below. The heads of all phases are built at the beginning; one that a phase
    does not use stays as it is."""
    combine: Combine = "sum"
    """Which losses in reach train a stage. `sum`: all that reach back a full window. `farthest`: the last one
    only, as in the code released with the paper; weaker on Transformers."""
    head_stride: int = Field(1, ge=1)
    """Build a head only at every n-th stage, counted back from the last; at most `window`."""
    streaming: bool = True
    """Let a stage start the next batch once its own work on this one is done. `false` changes no number,
    but makes `train_batch` return the exact loss of its batch."""
    tied_weights: Literal["untie", "sync", "error"] = "untie"
    """What happens to weights tied between stages outside mode `global`. `untie`: each stage trains its own
    copy. `sync`: an all-reduce in every batch keeps them equal; no stage then streams. `error`: refuse the
    model."""
    transport: Literal["auto", "gloo"] = "auto"
    """How tensors travel between GPUs. `auto`: over NCCL. `gloo`: through the host's memory, and so do
    DeepSpeed's collectives; slower, for machines without NCCL and ranks that share a GPU. CPUs use gloo."""
    timeout_seconds: float = Field(300, gt=0)
    """How long a stage waits for a neighbour before it gives up with an error; collectives of all stages
    wait this time multiplied by the number of stages."""
    setup_timeout_seconds: float = Field(1800, gt=0)
    """How long a rank waits for the others while the engine is made."""
    checkpoint_timeout_seconds: float = Field(1800, gt=0)
    """How long a rank waits for the others while a checkpoint is saved or loaded."""
    async_save: bool = False
    """Write checkpoints while training goes on: `save_checkpoint` returns once the host's memory has a copy.
    `drain`, the next save and the end of the process wait until it is complete; `latest` then names it."""
    nonfinite: Literal["error", "skip"] = "error"
    """What a stage does if a loss or the gradient of its batch is nan or infinite. `error`: stop. `skip`:
    leave out this step, and count it as `Train/stage_K/skipped_steps`; each stage by itself, but all together
    in mode `global` and with `"tied_weights": "sync"`."""
    extra_in_flight: int = Field(0, ge=0)
    """Micro-batches a stage may hold beyond what the plan needs, to hide a slow network."""
    head: HeadConfig = HeadConfig()
    """The auxiliary heads; see below."""
    trace: parts.TraceConfig | None = None
    """Record some batches as a trace and a picture; see below."""
    myopia: parts.MyopiaConfig | None = None
    """Measure how far each stage's gradient is from the global one; see below."""

    @field_validator("window", mode="after")
    @classmethod
    def _window_goes_with_interlock(cls, window: float | None, info: ValidationInfo) -> float | None:
        return window_of(info.data.get("mode"), window)  # the mode is missing if it is faulty itself

    @field_validator("schedule", mode="after")
    @classmethod
    def _phases_are_in_order(cls, schedule: list[PhaseConfig] | None) -> list[PhaseConfig] | None:
        faults = [] if schedule is None else faults_of_steps([phase.from_step for phase in schedule])
        if faults:
            raise ValueError("; ".join(faults))
        return schedule

    @model_validator(mode="after")
    def _schedule_or_mode(self) -> "InterlockConfig":
        others = [key for key in ("mode", "window") if key in self.model_fields_set]
        if self.schedule is not None and others:
            named = " and ".join(others)
            raise ValueError(f"schedule and {named} are both given: remove {named}, or schedule")
        return self

    @classmethod
    def from_deepspeed(cls, config: str | os.PathLike[str] | Mapping[str, Any]) -> "InterlockConfig":
        """Reads the ``"interlock"`` section of a DeepSpeed config: of its path, or of its contents.

        Raises:
            ConfigError: Listing every fault of the section, or saying why the file cannot be read.
        """
        if isinstance(config, Mapping):
            source, contents = "DeepSpeed config", config
        else:
            source, contents = str(config), read_deepspeed(config)
        faults = misspelt_sections(contents, SECTION)
        try:
            section = cls.model_validate(contents.get(SECTION, {}))
        except ValidationError as error:
            faults += [fault_of(SECTION, cls, detail) for detail in error.errors()]
        if faults:
            raise ConfigError(list_faults(source, faults))
        return section

    @property
    def phases(self) -> tuple[tuple[int, "InterlockConfig"], ...]:
        """For each phase of the schedule its first step and a section that means this phase alone."""
        if self.schedule is None:
            return ((0, self),)
        return tuple(
            (phase.from_step, self.model_copy(update=phase.keys(self.combine))) for phase in self.schedule
        )

    def limits(self, num_stages: int) -> dict[str, float]:
        """The longest collective, in seconds, by what ranks are doing."""
        return {
            "setup": self.setup_timeout_seconds,
            "step": self.timeout_seconds * num_stages,  # each may be behind the next by as much
            "checkpoint": self.checkpoint_timeout_seconds,
        }

    @property
    def mode_name(self) -> str:
        """What results call the mode: its name, or "schedule" where it changes on the way."""
        return self.mode if self.schedule is None else "schedule"

    @property
    def is_global(self) -> bool:
        """True for ordinary backpropagation throughout."""
        return all(section.mode == "global" for _, section in self.phases)

    def steps_alone(self, plan: GradientFlowPlan, *, tied: bool) -> bool:
        """True if a stage's update depends on its window only; ``tied``: whether stages share weights."""
        return not plan.is_end_to_end and not (tied and self.tied_weights == "sync")

    def streams(self, plan: GradientFlowPlan, *, tied: bool) -> bool:
        """True if a stage starts the next batch while others still work on this one; see ``steps_alone``."""
        return self.streaming and self.steps_alone(plan, tied=tied)

    def plan_schedule(self, stage_bounds: Sequence[int]) -> PlanSchedule:
        """The gradient-flow plans of all phases; a ConfigError names the phase that does not fit."""
        plans = []
        for number, (step, section) in enumerate(self.phases):
            try:
                plans.append((step, section.plan(stage_bounds)))
            except ConfigError as error:
                if self.schedule is None:
                    raise
                raise ConfigError(f"{SECTION}.schedule[{number}]: {error}") from error
        return PlanSchedule.of(*plans)

    def plan(self, stage_bounds: Sequence[int]) -> GradientFlowPlan:
        """The gradient-flow plan of a section without a schedule, for a model cut at ``stage_bounds``.

        These are ``num_stages + 1`` rising layer numbers, the first 0; a PlanError if not. ConfigError if the
        section does not fit them, or has a schedule.
        """
        if self.schedule is not None:
            what = f"a schedule of {len(self.schedule)} phases"
            raise ConfigError(f"{SECTION}.schedule: {what} has no single plan, see phases")
        end_to_end = GradientFlowPlan.end_to_end(stage_bounds=stage_bounds)
        if self.is_global:
            return end_to_end
        window, stride, weight = self.window or 1, self.head_stride, self.head.weight
        try:
            return GradientFlowPlan.n_wise(
                None, window, self.combine, head_stride=stride, stage_bounds=stage_bounds, head_weight=weight
            )
        except PlanError as error:
            keys = {"mode": self.mode, "window": window, "head_stride": stride}
            settings = ", ".join(f"{SECTION}.{key} {shown_as_json(value)}" for key, value in keys.items())
            num = end_to_end.num_stages
            raise ConfigError(f"{settings} do not fit a model of {num} stages: {error}") from error
