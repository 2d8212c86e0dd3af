"""What an auxiliary head costs beside its stage: FLOPs, memory, time.

    python -m benchmarks.head_cost --output head_cost.json
    python -m benchmarks.head_cost --device cuda --micro_batch_size 8 --output head_cost_cuda.json

The stage is three blocks of GPT-2 small (width 768), the heads have its vocabulary of some 50,000
words. For every setting of a head: the matrix-product FLOPs of its forward and backward (by formula),
the most memory that they allocate beyond what they start with (gradients of the weights included),
the parameters it trains and the bytes that AdamW keeps for them, and the time of its forward and
backward, and of its optimizer step, in units of the stage's. Gradients accumulate, as they do in every
micro-batch of a batch but the first. Below, the same loss computed by each implementation of the linear
cross-entropy. `benchmarks/head_quality.py` says what the cheap settings cost in quality.

Stage and heads are timed in turn, `--repeats` times; the shortest times count, since other processes
can only make them longer. With one thread on a CPU, seconds are those of the process, without what it
waited for others.
"""

import gc
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import results
from ds_interlock.config import HeadConfig
from ds_interlock.heads.cross_entropy import linear_cross_entropy
from ds_interlock.heads.factory import head_factory
from ds_interlock.models.lm import LMConfig, lm_layers, lm_loss
from ds_interlock.schedule.plan import LossHead
from measuring.results import new_figure, table_of

SETTINGS: dict[str, dict[str, Any]] = {
    "linear, all logits": {"type": "linear", "fused": False},
    "norm_linear, all logits": {"type": "norm_linear", "fused": False},
    "norm_linear": {"type": "norm_linear"},
    "norm_linear, 1/4 of tokens": {"type": "norm_linear", "token_fraction": 0.25},
    "norm_linear, 1/8 of tokens": {"type": "norm_linear", "token_fraction": 0.125},
    "low_rank 64": {"type": "low_rank"},
    "low_rank 64, 1/4 of tokens": {"type": "low_rank", "token_fraction": 0.25},
    "lens": {"type": "lens"},
    "lens, 1/4 of tokens": {"type": "lens", "token_fraction": 0.25},
    "lens, 1/8 of tokens": {"type": "lens", "token_fraction": 0.125},
}
TORCH_CHUNKS = "torch, its own chunks"
BACKENDS = ("full", "chunked", "torch", TORCH_CHUNKS, "liger")


OPTIONS: results.Options = {
    "width": (768, "of the hidden state"),
    "num_heads": (12, "attention heads of a block"),
    "num_blocks": (3, "blocks of the stage"),
    "vocab_size": (50_000, "tokens"),
    "seq_length": (512, "tokens in a block"),
    "micro_batch_size": (1, "blocks"),
    "device": ("cpu", "cpu or cuda"),
    "dtype": ("float32", "of weights and activations", ("float32", "bfloat16")),
    "threads": (1, "on a CPU"),
    "repeats": (5, "the shortest counts"),
    "settings": (list(SETTINGS), "of the heads", SETTINGS),
    "backends": (list(BACKENDS[:-1]), "of the linear cross-entropy; liger needs a GPU", BACKENDS),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and returns the results."""
    args = results.parse(__doc__, OPTIONS, argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench = Bench.build(args)
    rows = [measure_head(bench, args, setting) for setting in args.settings]
    rows += [
        measure_backend(bench, args, backend, frozen) for backend in args.backends for frozen in (False, True)
    ]
    return results.publish("head_cost", args, rows, argv)


@dataclass
class Bench:
    """A stage, what it is fed, and the heads to put on it."""

    stage: nn.Sequential
    lm: LMConfig
    hidden_btd: Tensor
    labels_bt: Tensor
    make: Callable[[nn.Module], nn.Module]
    """Brings a module to the device and data type."""

    @classmethod
    def build(cls, args: Namespace) -> "Bench":
        lm = LMConfig(args.vocab_size, args.seq_length, args.width, args.num_blocks, args.num_heads)
        make = partial(nn.Module.to, device=args.device, dtype=getattr(torch, args.dtype))
        stage = make(nn.Sequential(*(spec.build() for spec in lm_layers(lm)[2:-2])))
        shape = args.micro_batch_size, args.seq_length
        hidden_btd = torch.randn(*shape, args.width, device=args.device, dtype=getattr(torch, args.dtype))
        labels_bt = torch.randint(args.vocab_size, shape, device=args.device)
        return cls(stage, lm, hidden_btd, labels_bt, make)

    def head(self, config: HeadConfig) -> nn.Module:
        layers = lm_layers(self.lm)
        return self.make(head_factory(config, layers)(LossHead(stage=0, after_layer=len(layers) - 2)))

    def run_head(self, head: Any) -> None:
        """Forward and backward of a head, its input's gradient included."""
        hidden_btd = self.hidden_btd.detach().requires_grad_()
        head.loss(hidden_btd, self.labels_bt, lm_loss()).backward()

    def run_stage(self) -> None:
        """Forward and backward of the stage, its input's gradient included."""
        hidden_btd = self.hidden_btd.detach().requires_grad_()
        self.stage(hidden_btd).backward(self.hidden_btd)


def measure_head(bench: Bench, args: Namespace, setting: str) -> dict[str, Any]:
    """One line of the table of heads."""
    config = HeadConfig(**SETTINGS[setting])
    head = bench.head(config)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    peak_bytes = peak_memory(partial(bench.run_head, head), args.device)
    optimizer = torch.optim.AdamW(trained)
    seconds = shortest_seconds(
        {
            "forward": partial(bench.stage, bench.hidden_btd),
            "stage": bench.run_stage,
            "head": partial(bench.run_head, head),
            "step": optimizer.step,
        },
        args,
    )
    num_trained = sum(parameter.numel() for parameter in trained)
    result = {
        "part": "head",
        "setting": setting,
        "flops": head_flops(config, bench.labels_bt.numel(), bench.lm.width, bench.lm.vocab_size),
        "stage_flops": stage_flops(bench.lm, bench.labels_bt.numel()),
        "peak_bytes": peak_bytes,
        "num_trained": num_trained,
        "optimizer_bytes": sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        **{f"{name}_seconds": value for name, value in seconds.items()},
    }
    print(setting, {name: round(value, 4) for name, value in seconds.items()}, flush=True)
    del head, trained, optimizer
    gc.collect()
    return result


def measure_backend(bench: Bench, args: Namespace, backend: str, frozen: bool) -> dict[str, Any]:
    """One line of the table of implementations of the linear cross-entropy."""
    hidden_nd, labels_n = bench.hidden_btd.flatten(0, 1), bench.labels_bt.flatten()
    weight_vd = torch.empty(bench.lm.vocab_size, bench.lm.width, device=args.device, dtype=hidden_nd.dtype)
    weight_vd.normal_(std=0.02).requires_grad_(not frozen)

    def run() -> None:
        source_nd = hidden_nd.detach().requires_grad_()
        backend_loss(backend, source_nd, weight_vd, labels_n).backward()

    peak_bytes = peak_memory(run, args.device)
    seconds = shortest_seconds({"seconds": run}, args)
    print(backend, "frozen" if frozen else "", seconds, flush=True)
    return {"part": "backend", "setting": backend, "frozen": frozen, "peak_bytes": peak_bytes, **seconds}


def backend_loss(backend: str, hidden_nd: Tensor, weight_vd: Tensor, labels_n: Tensor) -> Tensor:
    """The loss by one implementation; torch's own also with the size of chunks that it chooses."""
    if backend == TORCH_CHUNKS:
        return F.linear_cross_entropy(
            hidden_nd, weight_vd, labels_n, reduction="sum", options=nn.LinearCrossEntropyOptions()
        )
    return linear_cross_entropy(hidden_nd, weight_vd, None, labels_n, backend=backend)  # type: ignore[arg-type]


def head_flops(config: HeadConfig, num_tokens: int, width: int, num_outputs: int) -> int:
    """Matrix-product FLOPs of a head's forward and backward, its input's gradient included.

    A product of ``[n, a]`` and ``[a, b]`` is ``2 n a b``; a trained matrix takes one in the forward and
    two in the backward, a frozen one saves that of its own gradient.
    """
    products = {
        "linear": 3 * width * num_outputs,
        "norm_linear": 3 * width * num_outputs,
        "low_rank": 3 * config.rank * (width + num_outputs),
        "lens": 3 * width * width + 2 * width * num_outputs,
    }
    return 2 * round(config.token_fraction * num_tokens) * products[config.type]


def stage_flops(lm: LMConfig, num_tokens: int) -> int:
    """The same for the stage's blocks: four times ``d x d`` for attention, eight for the MLP.

    The scores and mixtures of attention take ``2 t d`` per token and product; the half that causality makes
    needless counts too.
    """
    return 6 * num_tokens * lm.num_blocks * (12 * lm.width**2 + 2 * lm.seq_length * lm.width)


def shortest_seconds(works: dict[str, Callable[[], Any]], args: Namespace) -> dict[str, float]:
    """The shortest time of each of ``works`` in ``--repeats`` turns, after one that is not timed."""
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(args.repeats + 1):
        for name, work in works.items():
            synchronize(args.device)
            started = clock()
            work()
            synchronize(args.device)
            if turn:
                seconds[name].append(clock() - started)
    return {name: min(values) for name, values in seconds.items()}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_memory(work: Callable[[], Any], device: str) -> int:
    """The most bytes that tensors made by ``work`` take at one time.

    On a GPU the allocator counts; on a CPU the profiler's record of every allocation is added up.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def table(found: dict[str, Any]) -> str:
    """Heads beside the stage, then the implementations of the linear cross-entropy."""
    heads, backends = ([row for row in found["rows"] if row["part"] == part] for part in ("head", "backend"))
    return "\n\n".join([_head_table(heads), _backend_table(backends)])


def _head_table(rows: list[dict[str, Any]]) -> str:
    # All rows have timed the stage: the shortest is the least disturbed.
    forward = min(row["forward_seconds"] for row in rows)
    stage = min(row["stage_seconds"] for row in rows)
    columns = {
        "head": "setting",
        "GFLOPs": ("flops", 1e9),
        "of the stage's": ("flops", rows[0]["stage_flops"]),
        "peak MiB": ("peak_bytes", 2**20),
        "trained, millions": ("num_trained", 1e6),
        "optimizer MiB": ("optimizer_bytes", 2**20),
        "s": "head_seconds",
        "of the stage's forward": ("head_seconds", forward),
        "of its forward and backward": ("head_seconds", stage),
        "step, of the same": ("step_seconds", stage),
    }
    return (
        f"Stage: {rows[0]['stage_flops'] / 1e9:.3g} GFLOPs, forward {forward:.3g} s, "
        f"forward and backward {stage:.3g} s.\n\n{table_of(rows, columns)}"
    )


def _backend_table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "linear cross-entropy": "setting",
        "weight": lambda row: "frozen" if row["frozen"] else "trained",
        "s": "seconds",
        "peak MiB": ("peak_bytes", 2**20),
    }
    return table_of(rows, columns)


def draw(found: dict[str, Any]) -> Any:
    """Time of each head as a share of the stage's forward and backward, beside its share by FLOPs."""
    rows = [row for row in found["rows"] if row["part"] == "head"][::-1]
    figure, ((axis,),) = new_figure(1, "cost of a head, of its stage's forward and backward")
    stage = min(row["stage_seconds"] for row in rows)
    names = [row["setting"] for row in rows]
    shares = [row["flops"] / row["stage_flops"] for row in rows]
    axis.barh(names, [row["head_seconds"] / stage for row in rows], height=0.6, label="time")
    axis.scatter(shares, names, color="black", label="FLOPs", zorder=2)
    axis.axvline(0.3, color="gray", linestyle="--")
    axis.legend()
    return figure


if __name__ == "__main__":
    main()
