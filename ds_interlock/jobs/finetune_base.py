"""The base model's states on the training data, for heads that learn from it (``head.kl_weight``)."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_interlock.hf.data.batches import EvaluationBatches, TrainingBatches
from ds_interlock.hf.model.base_states import FOLDER, BaseStates, Share, digest_of_model, record
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.hf.model.states_file import check_room
from ds_interlock.jobs.process import propagate_errors


def add_base_states(
    engine: Any, pretrained: Pretrained, training: TrainingBatches | None, output: Path, step: int
) -> None:
    """If heads learn from the base model, sends its states along with the labels. All ranks must call it.

    A new run computes them; a resumed one must find them where the first part of it left them.

    Args:
        engine: The engine, still the base model at step 0.
        pretrained: The base model.
        training: The training data, on stage 0; None elsewhere.
        output: The job's output folder.
        step: Steps done.

    Raises:
        ConfigError: If there is no room for them, or they are missing or of another model.
    """
    if engine.interlock.head.kl_weight == 0 or not engine.module.schedule.heads:
        return
    folder = output / FOLDER
    width = int(pretrained.config.get_text_config().hidden_size)  # of what goes into the unembedding
    batches: list[EvaluationBatches] = []  # of all replicas
    shares: list[Share] = []
    with propagate_errors():
        if training is not None:
            shape, rows = training.shape, training.rows
            model = digest_of_model(pretrained.folder)
            batches = [EvaluationBatches(rows, shape, replica=r) for r in range(shape.num_replicas)]
            shares = [Share.of(of_replica, model) for of_replica in batches]
        if step == 0 and dist.get_rank() == 0:
            num_positions = sum(sum(share.lengths) for share in shares)
            num_bytes = num_positions * width * pretrained.dtype.itemsize
            check_room(folder, num_bytes)
            print(
                f"interlock.head.kl_weight: the base model's hidden states at {num_positions} positions go "
                f"to {folder}, {num_bytes / 1e9:.2f} GB"
            )
    if step == 0:
        replica = engine.grid.get_data_parallel_rank()
        own = (batches[replica], shares[replica]) if training is not None else (None, None)
        record(engine, folder, *own, width=width, dtype=pretrained.dtype)
    with propagate_errors():
        if training is not None:
            training.base_of_rows = BaseStates(folder, shares).stack
