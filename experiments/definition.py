"""The definition of an experiment: a TOML file in ``experiments/definitions``, checked before anything runs.

    seeds = [0, 1, 2]
    [modes."window 2"]                  one run for each mode and seed
    interlock = {window = 2, ...}       the "interlock" section of a DeepSpeed config, no more and no less
    [modes.PipeDream]
    asynchronous = "pipedream"          instead of a section: a rival with stale gradients (asynchronous.py)
    training = {learning_rate = 1e-3}   its own optimizer, learning rate and betas

With ``like = "resnet_32"`` a file has what that experiment's file has, except for what it says itself: it may
change single keys of model, training and measurements, or else whole keys.

A ``Run`` is the definition with one mode and one seed. The results file holds it beside the measurements, so
that each line of it can be run again.
"""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from ds_interlock import InterlockConfig
from ds_interlock.errors import ConfigError, list_faults
from experiments.asynchronous import Method

FOLDER = Path(__file__).parent / "definitions"
GLOBAL = "global"
"""The mode that all others are compared with; every experiment has it."""
LOCAL = "local"
LEARNING = {"optimizer", "learning_rate", "betas"}
"""What a mode may have of its own in ``training``; all else is the same for all modes of an experiment."""


class _Section(BaseModel, frozen=True, extra="forbid"):
    pass


class ProseModel(_Section):
    """A pre-LayerNorm language model; attention and MLP are layers of their own, a head's block is both."""

    kind: Literal["prose"] = "prose"
    vocab_size: int | None = Field(None, ge=300, le=2**16)
    """Words of a byte-pair encoding of the text; characters by default."""
    seq_length: int = Field(64, ge=1)
    width: int = Field(64, ge=1)
    num_blocks: int = Field(8, ge=1)
    num_heads: int = Field(2, ge=1)
    init_std: float = Field(0.08, gt=0)
    """Of the initial matrices. With GPT-2's 0.02, at this width, global learns little in the first steps."""
    embedding_std: float | None = Field(None, gt=0)
    """Of the initial token embedding, if not ``init_std``. Where many blocks add to a small embedding, little
    of the token is left at the end of the model."""
    border_norm: bool = False
    """A LayerNorm on the residual stream at every stage border."""


class ImageModel(_Section):
    """A ResNet on Fashion-MNIST."""

    kind: Literal["images"] = "images"
    depth: int = 20
    width: int = Field(16, ge=1)
    head_channels: tuple[int, ...] = ()
    """Convolutions of an auxiliary head; none: global pooling and a linear layer."""
    head_size: int | None = Field(None, ge=1)
    """Rows and columns that a head averages its input to before the convolutions; all by default."""
    num_train_images: int | None = Field(None, ge=1)
    """The first so many training images; all by default."""
    num_validation_images: int = Field(0, ge=0)
    """The last so many training images are scored in place of the test set, as for choosing a rate."""


class Training(_Section):
    """Optimizer and budget. The learning rate rises for ``warmup_steps``, then stays."""

    num_steps: int = Field(ge=1)
    """The budget: quality is compared after so many batches."""
    micro_batch_size: int = Field(ge=1)
    num_micro_batches: int = Field(1, ge=1)
    optimizer: Literal["adamw", "nadam", "sgd"]
    """NAdam has AdamW's weight decay. SGD has a momentum of 0.9."""
    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW and NAdam."""
    ends_rate_scale: float = Field(1.0, gt=0)
    """Learning rate of the model's first and last two layers, as a multiple of the blocks'. In a language
    model these are embeddings, norm and unembedding, and rows of rare words have few gradients."""
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    max_gradient_norm: float | None = Field(None, gt=0)
    """Each stage's gradients are clipped by themselves outside of global mode, as in the engine."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of products in layers and heads (``torch.autocast``). Weights, optimizer and averages are float32."""


class Measurements(_Section):
    """What is measured during training, and how often, in steps."""

    evaluate_every: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    """Validation samples of an evaluation during training."""
    num_final_samples: int = Field(ge=1)
    """Validation samples of the evaluation at the end of the budget."""
    evaluation_batch_size: int = Field(256, ge=1)
    cosines_every: int | None = Field(None, ge=1)
    """The myopia meter: at the evaluations after a multiple of so many steps, on the next batch."""


class _Interlocked(_Section):
    interlock: dict[str, Any] = {}
    """The "interlock" section of a DeepSpeed config."""
    asynchronous: Method | None = None
    """An asynchronous pipeline without auxiliary heads, in place of a section."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> "_Interlocked":
        if bool(self.interlock) == bool(self.asynchronous):
            raise ValueError('expected either "interlock" or "asynchronous"')
        return self

    @property
    def section(self) -> InterlockConfig:
        """The section, checked."""
        return InterlockConfig.from_deepspeed({"interlock": self.interlock})

    @property
    def flow(self) -> dict[str, Any]:
        """What the time of a batch depends on: the section, or ``{"asynchronous": method}``."""
        return self.interlock or {"asynchronous": self.asynchronous}


class Mode(_Interlocked):
    """One row of the table."""

    model: dict[str, Any] = {}
    """Differences from the experiment's model."""
    training: dict[str, Any] = {}
    """Differences from the experiment's training, in ``LEARNING``."""
    num_steps: int | None = Field(None, ge=1)
    """Steps beyond the budget, to see when the mode reaches global's loss."""
    seeds: tuple[int, ...] | None = None
    """Seeds, if not the experiment's."""


class Run(_Interlocked):
    """Everything that decides what a run does: the definition with one mode and one seed."""

    experiment: str
    mode: str
    seed: int
    num_stages: int
    model: ProseModel | ImageModel = Field(discriminator="kind")
    training: Training
    measurements: Measurements
    num_steps: int
    """Batches to train on: the budget, ``training.num_steps``, or more."""


class Definition(_Section):
    """The contents of an experiment's file."""

    title: str
    about: str
    minutes: float = Field(gt=0)
    """What all runs take one after the other on one core."""
    num_stages: int = Field(ge=2)
    seeds: tuple[int, ...] = Field(min_length=1)
    model: ProseModel | ImageModel = Field(discriminator="kind")
    training: Training
    measurements: Measurements
    modes: dict[str, Mode]
    conclusions: str = ""
    """For the end of the experiment's section of the report."""

    @model_validator(mode="after")
    def _has_global(self) -> "Definition":
        if GLOBAL not in self.modes or not self.modes[GLOBAL].section.is_global:
            raise ValueError('modes: expected one named "global", which the others are compared with')
        for mode in self.modes.values():
            _ = mode.section, self.model_of(mode), self.training_of(mode)  # raise if they are faulty
        return self

    def model_of(self, mode: Mode) -> ProseModel | ImageModel:
        """The experiment's model with the differences of ``mode``."""
        return type(self.model)(**{**self.model.model_dump(), **mode.model})

    def training_of(self, mode: Mode) -> Training:
        """The experiment's training with the differences of ``mode``."""
        if others := sorted(mode.training.keys() - LEARNING):
            raise ValueError(f"training of a mode: got {', '.join(others)}, expected only {sorted(LEARNING)}")
        return Training(**{**self.training.model_dump(), **mode.training})

    def runs(self, experiment: str) -> list[Run]:
        """All runs, seed by seed, so that an interrupted experiment has whole rows of seeds."""
        seeds = dict.fromkeys(seed for mode in self.modes.values() for seed in mode.seeds or self.seeds)
        return [
            Run(
                experiment=experiment,
                mode=name,
                seed=seed,
                num_stages=self.num_stages,
                model=self.model_of(mode),
                training=self.training_of(mode),
                measurements=self.measurements,
                interlock=mode.interlock,
                asynchronous=mode.asynchronous,
                num_steps=max(mode.num_steps or 0, self.training.num_steps),
            )
            for seed in seeds
            for name, mode in self.modes.items()
            if seed in (mode.seeds or self.seeds)
        ]


def names() -> list[str]:
    """All experiments with a file."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load(name: str) -> Definition:
    """Reads an experiment's file.

    Raises:
        ConfigError: If there is no experiment of this name, or listing all faults of its file.
    """
    return checked(_contents(name), str(FOLDER / f"{name}.toml"))


def _contents(name: str) -> dict[str, Any]:
    """Of an experiment's file, and of the one that it is like."""
    file = FOLDER / f"{name}.toml"
    if not file.is_file():
        raise ConfigError(f"there is no experiment {name!r}: expected one of {', '.join(names())}")
    try:
        own = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    if "like" not in own:
        return own
    other = _contents(own.pop("like"))
    tables = {key: {**other[key], **own[key]} for key in ("model", "training", "measurements") if key in own}
    return {**other, "conclusions": "", **own, **tables}


def checked(contents: dict[str, Any], source: str) -> Definition:
    """The definition in ``contents``; ConfigError listing all faults, of ``source``, if it is none."""
    try:
        return Definition.model_validate(contents)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}, got {detail['input']!r}"
            for detail in error.errors()
        ]
        raise ConfigError(list_faults(source, faults)) from error
