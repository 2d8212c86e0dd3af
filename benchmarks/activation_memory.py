"""Activation memory of the first stage as the pipeline grows: flat for a fixed window, rising for global.

    python -m benchmarks.activation_memory --output activation_memory.json

A Transformer language model with ``--blocks_per_stage`` blocks a stage is trained for one batch of 2 K
micro-batches, all stages in one process. While stage 0 does its work, in the order of its own program,
the bytes that autograd keeps for it are counted: every storage once, without parameters. Beside them is
what the plan says: ``in_flight`` micro-batches times the bytes of one. Under local learning stage 0 has a
head, whose own activations live only while it runs; they are counted apart.
"""

import argparse
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import results
from ds_interlock import GradientFlowPlan, InProcessPipeline
from ds_interlock.models.lm import LMConfig, Unembedding, build_lm, lm_loss
from ds_interlock.schedule.action import Action, Kind

WINDOWS: tuple[float, ...] = (1, 1.25, 2, 3)
GLOBAL = "global"


class LiveBytes:
    """Counts the bytes that autograd keeps for what is computed within ``counting``.

    Args:
        excluded: Tensors whose storages do not count, such as parameters.

    Attributes:
        peak: The most bytes kept at once.
    """

    def __init__(self, excluded: Iterator[Tensor]) -> None:
        self.peak = 0
        self._now = 0
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._holders: Counter[int] = Counter()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is saved inside, until it is let go of, be that inside or later."""
        with saved_tensors_hooks(self._save, _Saved.tensor_of):
            yield

    def _save(self, tensor: Tensor) -> "_Saved":
        saved = _Saved(tensor)
        storage = tensor.untyped_storage()
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        if address not in self._excluded:
            if self._holders[address] == 0:
                self._now += num_bytes
                self.peak = max(self.peak, self._now)
            self._holders[address] += 1
            weakref.finalize(saved, self._release, address, num_bytes)
        return saved

    def _release(self, address: int, num_bytes: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            self._now -= num_bytes


class _Saved:
    """What autograd holds in place of a tensor; it is let go of when the graph is."""

    def __init__(self, tensor: Tensor) -> None:
        # An operator's own result, kept with its history, would keep the operator, which keeps the result.
        self.tensor = tensor.detach()

    @staticmethod
    def tensor_of(saved: "_Saved") -> Tensor:
        return saved.tensor


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and returns the results."""
    args = _arguments(argv)
    torch.set_num_threads(1)
    rows = []
    for setting in (*WINDOWS, GLOBAL):
        for num_stages in args.stages:
            if setting == GLOBAL or float(setting) <= num_stages:
                rows.append(measure(setting, num_stages, args))
    found = results.collect("activation_memory", args, rows, argv)
    results.publish(found, args.output)
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[2, 4, 8, 16], help="numbers of stages K (2 4 8 16)"
    )
    parser.add_argument("--blocks_per_stage", type=int, default=4, help="at least 2 (%(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of the hidden state (%(default)s)")
    parser.add_argument("--seq_length", type=int, default=64, help="tokens of a micro-batch (%(default)s)")
    parser.add_argument("--vocab_size", type=int, default=512, help="(%(default)s)")
    results.add_output(parser)
    return parser.parse_args(argv)


def measure(setting: float | str, num_stages: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one batch and counts what stage 0 holds."""
    net = _model(setting, num_stages, args)
    ids_mbt = torch.randint(args.vocab_size, (2 * num_stages, 1, args.seq_length + 1))
    micro_batches = [(ids_bt[:, :-1].clone(), ids_bt[:, 1:].clone()) for ids_bt in ids_mbt]
    one, _ = _peaks(net, micro_batches[:1])
    peak, head_peak = _peaks(net, micro_batches)
    in_flight = net.plan.in_flight(0)
    return {
        "setting": setting if setting == GLOBAL else f"window {setting:g}",
        "stages": num_stages,
        "micro_batches": 2 * num_stages,
        "peak_bytes": peak,
        "micro_batch_bytes": one,
        "in_flight": in_flight,
        "planned_bytes": in_flight * one,
        "head_peak_bytes": head_peak,
    }


def _model(setting: float | str, num_stages: int, args: argparse.Namespace) -> InProcessPipeline:
    config = LMConfig(
        vocab_size=args.vocab_size,
        seq_length=args.seq_length,
        width=args.width,
        num_blocks=args.blocks_per_stage * num_stages,
        num_heads=4,
    )
    # The embeddings belong to the first stage, norm and unembedding to the last.
    inner = [2 + args.blocks_per_stage * stage for stage in range(1, num_stages)]
    bounds = [0, *inner, config.num_layers]
    if setting == GLOBAL:
        plan = GradientFlowPlan.end_to_end(stage_bounds=bounds)
    else:
        plan = GradientFlowPlan.n_wise(window=float(setting), stage_bounds=bounds)
    return InProcessPipeline(
        build_lm(config),
        lm_loss(),
        plan,
        head=lambda place: nn.Sequential(nn.LayerNorm(args.width), Unembedding(args.width, args.vocab_size)),
    )


def _peaks(net: InProcessPipeline, micro_batches: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Peak bytes of stage 0's layers, and of its head, in a batch of ``micro_batches``."""
    of_layers, of_head = (LiveBytes(net.parameters()) for _ in range(2))
    stage = net.stages[0]
    run = stage.run

    def counted(action: Action) -> Any:
        with (of_head if action.kind is Kind.HEAD else of_layers).counting():
            return run(action)

    stage.run = counted  # type: ignore[method-assign]
    net.accumulate_gradients(micro_batches)
    stage.run = run  # type: ignore[method-assign]
    return of_layers.peak, of_head.peak


def table(found: dict[str, Any]) -> str:
    """Peak bytes of stage 0 for each setting and number of stages, as Markdown."""
    header = [
        "setting",
        "K",
        "M",
        "peak KiB",
        "one micro-batch KiB",
        "in flight (plan)",
        "planned KiB",
        "head KiB, while it runs",
    ]
    lines = [
        (
            row["setting"],
            row["stages"],
            row["micro_batches"],
            row["peak_bytes"] / 1024,
            row["micro_batch_bytes"] / 1024,
            row["in_flight"],
            row["planned_bytes"] / 1024,
            row["head_peak_bytes"] / 1024,
        )
        for row in found["rows"]
    ]
    return results.markdown(header, lines)


def draw(found: dict[str, Any]) -> Any:
    """Peak bytes over K, a line for each setting."""
    figure, axes = results.new_figure(1, "Activation memory of stage 0, M = 2 K")
    axis = axes[0, 0]
    settings = list(dict.fromkeys(row["setting"] for row in found["rows"]))
    for number, setting in enumerate(settings):
        rows = [row for row in found["rows"] if row["setting"] == setting]
        kib = [row["peak_bytes"] / 1024 for row in rows]
        axis.plot(
            [row["stages"] for row in rows], kib, "o-", label=setting, linewidth=2 * (len(settings) - number)
        )
    axis.set(xlabel="pipeline stages K", ylabel="peak KiB kept by autograd", ylim=(0, None))
    results.add_legend(figure, axis)
    return figure


if __name__ == "__main__":
    main()
