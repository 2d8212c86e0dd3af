"""Activation memory of the first stage as the pipeline grows: flat for a fixed window, rising for global.

    python -m benchmarks.activation_memory --output activation_memory.json

A Transformer language model is trained for one batch of 2 K micro-batches, all stages in one process. While
stage 0 does its work, in the order of its own program, the bytes that autograd keeps for it are counted:
every storage once, without parameters. Beside them is the plan's number: ``in_flight`` micro-batches times
the bytes of one. Under local learning stage 0 has a head, whose own activations live only while it runs;
they are counted apart.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks import results
from benchmarks.language_models import GLOBAL, pipeline_of
from ds_interlock import HeadConfig, InProcessPipeline
from ds_interlock.models.lm import LMConfig
from ds_interlock.schedule.action import Action, Kind

WINDOWS: tuple[float, ...] = (1, 1.25, 2, 3)
OPTIONS: results.Options = {
    "stages": ([2, 4, 8, 16], "numbers of stages K"),
    "blocks_per_stage": (4, "at least 2"),
    "width": (64, "of the hidden state"),
    "seq_length": (64, "tokens of a micro-batch"),
    "vocab_size": (512, "tokens"),
}


class LiveBytes:
    """Counts the bytes that autograd keeps, without the storages of the tensors in ``excluded``.

    ``peak`` is the most at once.
    """

    def __init__(self, excluded: Iterator[Tensor]) -> None:
        self.peak = 0
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._live: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def counting(self) -> saved_tensors_hooks:
        """Counts what is saved within this context, until it is released, within it or later."""
        return saved_tensors_hooks(self._save, lambda saved: saved)

    def _save(self, tensor: Tensor) -> Tensor:
        # An operator's own result, kept with its history, would keep the operator, which keeps the result.
        saved = tensor.detach()
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self._excluded:
            self._live[saved] = storage.data_ptr(), storage.nbytes()
            self.peak = max(self.peak, sum(num_bytes for _, num_bytes in set(self._live.values())))
        return saved


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    torch.set_num_threads(1)
    rows = [
        measure(window, num_stages, args)
        for window in (*WINDOWS, None)
        for num_stages in args.stages
        if window is None or window <= num_stages
    ]
    results.publish("activation_memory", args, rows, argv)


def measure(window: float | None, num_stages: int, args: Namespace) -> results.Row:
    """Trains one batch and counts what stage 0 holds; without a window under global backpropagation."""
    num_blocks = args.blocks_per_stage * num_stages
    config = LMConfig(args.vocab_size, args.seq_length, args.width, num_blocks, num_heads=4)
    net = pipeline_of(config, window, num_stages, HeadConfig(type="norm_linear", fused=False))
    ids_mbt = torch.randint(args.vocab_size, (2 * num_stages, 1, args.seq_length + 1))
    micro_batches = [(ids_bt[:, :-1].clone(), ids_bt[:, 1:].clone()) for ids_bt in ids_mbt]
    one, _ = _peaks(net, micro_batches[:1])
    peak, head_peak = _peaks(net, micro_batches)
    in_flight = net.plan.in_flight(0)
    return {
        "setting": GLOBAL if window is None else f"window {window:g}",
        "stages": num_stages,
        "micro_batches": 2 * num_stages,
        "peak_bytes": peak,
        "micro_batch_bytes": one,
        "in_flight": in_flight,
        "planned_bytes": in_flight * one,
        "head_peak_bytes": head_peak,
    }


def _peaks(net: InProcessPipeline, micro_batches: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Peak bytes of stage 0's layers, and of its head, in a batch of ``micro_batches``."""
    of_layers, of_head = (LiveBytes(net.parameters()) for _ in range(2))
    stage = net.stages[0]
    run = stage.run

    def counted(action: Action) -> Any:
        with (of_head if action.kind is Kind.HEAD else of_layers).counting():
            return run(action)

    with patch.object(stage, "run", counted):
        net.accumulate_gradients(micro_batches)
    return of_layers.peak, of_head.peak


if __name__ == "__main__":
    main()
