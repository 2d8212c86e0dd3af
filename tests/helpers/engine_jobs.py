"""Small training jobs for the pool of ranks: what they train, and what comes out.

A ``Job`` is a value, sent to every rank; ``train`` carries it out there and returns an ``Outcome``.
The model is a small language model: an embedding, residual blocks, a norm and an unembedding, so
that every type of head finds what it needs.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, VOCABULARY, LENGTH = 8, 11, 5
BASE_SEED = 77

FP32_ZERO_1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
BF16 = {"bf16": {"enabled": True}}
BF16_ZERO_1 = {**BF16, "zero_optimization": {"stage": 1}}
BF16_ZERO_1_FP32_SUMS = {**BF16_ZERO_1, "data_types": {"grad_accum_dtype": "fp32"}}
WARMUP = {
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": 3e-2, "warmup_num_steps": 7},
    }
}

MicroBatch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """A residual block."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return hidden_btd + self.dropout(torch.tanh(self.linear(self.norm(hidden_btd))))


def unembed(embedding: nn.Embedding, hidden_btd: Tensor) -> Tensor:
    """The tied unembedding."""
    return hidden_btd @ embedding.weight.T


def loss_fn(logits_btv: Tensor, labels_bt: Tensor) -> Tensor:
    return F.cross_entropy(logits_btv.flatten(0, 1).float(), labels_bt.flatten())


def layers(dropout: float = 0.0, num_blocks: int = 8, *, tied: bool = False) -> list[Any]:
    """Layer specs; with 8 blocks 11 layers, which no number of stages up to 5 divides."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    first, last = LayerSpec(nn.Embedding, VOCABULARY, WIDTH), LayerSpec(nn.Linear, WIDTH, VOCABULARY)
    if tied:
        first = TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH)
        last = TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH, forward_fn=unembed)
    blocks = [LayerSpec(Block, dropout) for _ in range(num_blocks)]
    return [first, *blocks, LayerSpec(nn.LayerNorm, WIDTH), last]


def micro_batches(num: int, *, replica: int = 0, seed: int = 5, length: int = LENGTH) -> list[MicroBatch]:
    """Micro-batches of two sequences, different for each replica."""
    generator = torch.Generator().manual_seed(100 * seed + replica)
    return [
        (
            torch.randint(0, VOCABULARY, (2, length), generator=generator),
            torch.randint(0, VOCABULARY, (2, length), generator=generator),
        )
        for _ in range(num)
    ]


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        section: The "interlock" section; None for DeepSpeed's own pipeline.
        num_stages: Pipeline stages; what is left of the ranks are replicas.
        num_micro_batches: Of a batch.
        num_batches: To train.
        extra: Keys of the DeepSpeed config, added to and replacing those of ``config``.
        dropout: Of the blocks.
        tied: Whether the unembedding is the embedding.
        module: Keyword arguments of the pipeline module.
    """

    section: dict[str, Any] | None
    num_stages: int = 4
    num_micro_batches: int = 4
    num_batches: int = 5
    extra: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    tied: bool = False
    module: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> "Job":
        """This job with some of its values changed."""
        return replace(self, **changes)

    def config(self) -> dict[str, Any]:
        """The DeepSpeed config."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.num_micro_batches,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "gradient_clipping": 0.1,  # active: the norm is some 0.4
            "steps_per_print": None,
            **copy.deepcopy(self.extra),
        }
        if self.section is not None:
            config["interlock"] = {"timeout_seconds": 120, **self.section}
        return config


@dataclass(frozen=True)
class Outcome:
    """What a job came to on one rank.

    Attributes:
        returned: What ``train_batch`` returned, batch by batch.
        final: The exact final loss of the last batch.
        parameters: Every parameter of this rank by name.
    """

    returned: list[float]
    final: float
    parameters: dict[str, Tensor]


def make_module(job: Job, **module: Any) -> Any:
    """The pipeline module of ``job``. Every layer starts from a seed of its own."""
    from deepspeed.pipe import PipelineModule

    from ds_interlock import InterlockConfig, InterlockPipelineModule

    arguments: dict[str, Any] = {
        "layers": layers(job.dropout, tied=job.tied),
        "loss_fn": loss_fn,
        "num_stages": job.num_stages,
        "partition_method": "uniform",
        "seed_layers": True,
        "base_seed": BASE_SEED,
        **job.module,
        **module,
    }
    torch.manual_seed(BASE_SEED)
    if job.section is None:
        net = PipelineModule(**arguments)
    else:
        arguments.setdefault("interlock", InterlockConfig.from_deepspeed(job.config()))
        net = InterlockPipelineModule(**arguments)
    # From here on dropout is drawn from the rank's own random state.
    net.seed_layers = job.module.get("seed_layers", False)
    return net


def make_engine(job: Job, *, training_data: Any = None, **module: Any) -> Any:
    """The engine of ``job``, with a random state that depends on the rank only."""
    import deepspeed

    import ds_interlock

    net = make_module(job, **module)
    initialize = deepspeed.initialize if job.section is None else ds_interlock.initialize
    engine, *_ = initialize(model=net, config=job.config(), training_data=training_data)
    torch.manual_seed(900 + engine.global_rank)
    return engine


def data_for(engine: Any, job: Job) -> Iterator[MicroBatch]:
    """The training data of this rank's replica."""
    num = job.num_batches * job.num_micro_batches
    return iter(micro_batches(num, replica=engine.grid.get_data_parallel_rank()))


def train(job: Job) -> Outcome:
    """Trains ``job`` from the start. On a rank."""
    engine = make_engine(job)
    data = data_for(engine, job)
    returned = [float(engine.train_batch(data)) for _ in range(job.num_batches)]
    final = returned[-1] if job.section is None else float(engine.drain())
    outcome = Outcome(returned, final, parameters_of(engine))
    engine.destroy()
    return outcome


def train_all(jobs: Sequence[Job]) -> list[Outcome]:
    """Trains one job after another. On a rank."""
    return [train(job) for job in jobs]


def parameters_of(engine: Any) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def outcomes(pool: Any, *jobs: Job) -> list[list[Outcome]]:
    """For each job its outcome on every rank of ``pool``."""
    by_rank = pool.run(train_all, jobs=jobs, within_seconds=240 + 15 * len(jobs))
    return [list(of_job) for of_job in zip(*by_rank, strict=True)]


def assert_same(some: Sequence[Outcome], others: Sequence[Outcome]) -> None:
    """Every parameter on every rank, and the final loss: bit for bit."""
    for rank, (one, other) in enumerate(zip(some, others, strict=True)):
        assert one.parameters.keys() == other.parameters.keys()
        different = [
            name
            for name, parameter in one.parameters.items()
            if not torch.equal(parameter, other.parameters[name])
        ]
        assert not different, f"rank {rank}: {different} differ"
        assert one.final == other.final, f"rank {rank}"


def is_same(some: Sequence[Outcome], others: Sequence[Outcome]) -> bool:
    """Whether every parameter is the same on every rank: to see that a test could fail."""
    return all(
        torch.equal(parameter, other.parameters[name])
        for one, other in zip(some, others, strict=True)
        for name, parameter in one.parameters.items()
    )
