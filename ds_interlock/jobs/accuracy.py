"""The accuracy of a classifier: predictions are made on the last stage, labels are known on the first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from ds_interlock.hf.data.batches import EvaluationBatches


@contextmanager
def predictions(engine: Any, task: str) -> Iterator[list[int]]:
    """On the last stage collects the most likely classes of what it evaluates, row by row."""
    classes: list[int] = []
    if task != "classification" or not engine.is_last_stage():
        yield classes
        return
    end = engine.module.forward_funcs[-1]
    handle = end.register_forward_hook(lambda *call: classes.extend(call[-1].argmax(-1).tolist()))
    try:
        yield classes
    finally:
        handle.remove()


def accuracy(engine: Any, validation: EvaluationBatches | None, predicted: list[int]) -> float:
    """The share of validation samples whose class was predicted; on every rank. All ranks must call it."""
    replica = engine.grid.get_data_parallel_rank()
    by_replica = dict(_gather((replica, predicted) if engine.is_last_stage() else None))
    counts = None
    if validation is not None:
        labels = [int(label) for _, (labels_b, _) in validation for label in labels_b]
        rows = zip(labels, by_replica[replica], strict=True)
        pairs = [(label, guess) for label, guess in rows if label >= 0]
        counts = sum(label == guess for label, guess in pairs), len(pairs)
    all_counts = _gather(counts)
    return float(sum(right for right, _ in all_counts) / sum(labelled for _, labelled in all_counts))


def _gather(value: Any) -> list[Any]:
    """The values of all ranks that have one."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return [value for value in values if value is not None]
