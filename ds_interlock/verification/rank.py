"""One of the processes of a verification: ``python -m ds_interlock.verification.rank FOLDER RANK``.

Carries out all runs of ``FOLDER/job.pickle`` with the real engine, one after the other, and leaves
what its stage got in ``FOLDER/rank_RANK.pt``, or why it could not in ``FOLDER/rank_RANK.error``.
"""

import pickle
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it without a type

from ds_interlock.config import InterlockConfig
from ds_interlock.config.strict import SECTION
from ds_interlock.verification.reference import (
    NUM_SAMPLES,
    loss_fn,
    micro_batches,
    random_batches,
    small_model,
)

RUNS_DONE = "verification/runs_done"
"""Where the job's store counts the runs that rank 0 has finished."""

_LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Run:
    """One training of the small model, always from the same weights on the same samples.

    Attributes:
        interlock: The section to train under.
        num_micro_batches: Into how many each batch is cut.
        num_batches: Batches, and so optimizer steps.
    """

    interlock: InterlockConfig
    num_micro_batches: int
    num_batches: int


@dataclass(frozen=True)
class Job:
    """What the processes are to do.

    Attributes:
        port: Where the job's store listens, on this machine.
        stage_bounds: How the layers are cut, a stage for each process.
        seed: Of weights and data.
        timeout_seconds: How long the processes wait for each other to come up.
        runs: What to run, in order.
    """

    port: int
    stage_bounds: tuple[int, ...]
    seed: int
    timeout_seconds: float
    runs: tuple[Run, ...]

    @property
    def num_stages(self) -> int:
        """Number of stages, and of processes."""
        return len(self.stage_bounds) - 1


@dataclass(frozen=True)
class Outcome:
    """What one run gave: on a rank, of its stage; put together, of the whole model.

    Attributes:
        gradients: Of the first batch, by parameter name.
        weights: After the last batch, by parameter name.
        loss: The final loss of the last batch.
    """

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    loss: Tensor


def train(run: Run, job: Job) -> Outcome:
    """Trains the small model as ``run`` says. All ranks of the job must call it."""
    from deepspeed.runtime.utils import partition_uniform

    import ds_interlock

    layers = small_model(job.stage_bounds[-1], job.seed)
    assert tuple(partition_uniform(len(layers), job.num_stages)) == job.stage_bounds
    net = ds_interlock.InterlockPipelineModule(
        layers,
        interlock=run.interlock,
        loss_fn=loss_fn,
        num_stages=job.num_stages,
        partition_method="uniform",
    )
    # Plain SGD: weights then differ wherever gradients do, however small they are. DeepSpeed clips by
    # default, and before the hook below sees the gradients.
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
            gradients.update({name: _gradient(parameter) for name, parameter in parameters.items()})

    optimizer.register_step_pre_hook(keep_first_gradients)
    batches = random_batches(run.num_batches, job.seed)
    data = iter([part for batch in batches for part in micro_batches(batch, run.num_micro_batches)])
    for _ in range(run.num_batches):
        engine.train_batch(data)
    loss = engine.drain()
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return Outcome(gradients, weights, loss)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _work(folder: Path, rank: int) -> None:
    import ds_interlock

    job: Job = pickle.loads((folder / "job.pickle").read_bytes())
    torch.set_num_threads(1)
    timeout = timedelta(seconds=job.timeout_seconds)
    store = TCPStore("127.0.0.1", job.port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.num_stages, timeout=timeout)
    ds_interlock.init_distributed("gloo")
    outcomes = []
    for run in job.runs:
        outcomes.append(vars(train(run, job)))
        if rank == 0:
            store.add(RUNS_DONE, 1)
    torch.save(outcomes, folder / f"rank_{rank}.pt")
    dist.barrier()  # nobody leaves while others still need it


def main() -> None:
    """Runs the rank that the command line names."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    try:
        _work(folder, rank)
    except Exception as error:
        (folder / f"rank_{rank}.error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise


if __name__ == "__main__":
    # Under its full name: what is pickled here must be found there.
    from ds_interlock.verification.rank import main as run_rank

    run_rank()
