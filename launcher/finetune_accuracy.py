"""How often a classifier is right: predictions are made on the last stage, labels are known on the first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from ds_interlock.hf.data.batches import EvaluationBatches


@contextmanager
def predictions(engine: Any, task: str) -> Iterator[list[int]]:
    """On the last stage collects the most likely classes of what it evaluates, row by row."""
    found: list[int] = []
    if task != "classification" or not engine.is_last_stage():
        yield found
        return
    end = engine.module.forward_funcs[-1]
    handle = end.register_forward_hook(lambda *call: found.extend(call[-1].argmax(-1).tolist()))
    try:
        yield found
    finally:
        handle.remove()


def accuracy(engine: Any, validation: EvaluationBatches | None, predicted: list[int]) -> float:
    """The share of the validation samples whose class was predicted; on every rank. All must call it."""
    replica = engine.grid.get_data_parallel_rank()
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, (replica, predicted) if engine.is_last_stage() else None)
    told = [0.0]
    if validation is not None:
        own = next(found for at in of_all if at is not None for number, found in [at] if number == replica)
        labels = [int(label) for _, (labels_b, _) in validation for label in labels_b]
        pairs = [(label, guess) for label, guess in zip(labels, own, strict=True) if label >= 0]
        told = [sum(label == guess for label, guess in pairs), len(pairs)]
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, told if validation is not None else None)
    counts = [count for count in of_all if count is not None]
    return float(sum(right for right, _ in counts) / sum(seen for _, seen in counts))
