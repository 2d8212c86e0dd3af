"""What an auxiliary head costs beside its stage: FLOPs, memory, time.

    python -m benchmarks.head_cost --output head_cost.json
    python -m benchmarks.head_cost --device cuda --micro_batch_size 8 --output head_cost_cuda.json

The stage is three blocks of GPT-2 small, the heads have its vocabulary of some 50,000 words. For every
setting of a head: FLOPs of its matrix products, the most memory that it allocates (gradients of the
weights included), and the time of its forward and backward, and of its optimizer step, in units of the
stage's. Below, the same loss by each implementation of the linear cross-entropy. Works are timed in
turn, and the shortest times count, on a CPU those of one thread without what it waited for others.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import results
from ds_interlock.config import HeadConfig
from ds_interlock.heads.cross_entropy import CHUNK_BYTES, linear_cross_entropy
from ds_interlock.heads.factory import head_factory
from ds_interlock.models.lm import LMConfig, lm_layers, lm_loss
from ds_interlock.profiling.layers import FlopMeter
from ds_interlock.schedule.plan import LossHead

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
BACKENDS = ("full", "chunked", "torch", TORCH_CHUNKS)
OPTIONS: results.Options = {
    "width": (768, "of the hidden state"),
    "num_heads": (12, "attention heads of a block"),
    "num_blocks": (3, "blocks of the stage"),
    "vocab_size": (50_000, "tokens"),
    "seq_length": (512, "tokens in a block"),
    "micro_batch_size": (1, "blocks"),
    "device": ("cpu", "cpu or cuda"),
    "dtype": ("float32", "of weights and activations", ("float32", "bfloat16")),
    "repeats": (5, "the shortest counts"),
    "settings": (list(SETTINGS), "of the heads", SETTINGS),
    "backends": (list(BACKENDS), "of the linear cross-entropy; torch's need 2.13", BACKENDS),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(args)
    heads = [bench.measure_head(setting) for setting in args.settings]
    # All rows have timed the stage: the shortest is the least disturbed.
    forward, stage = (min(row[key] for row in heads) for key in ("forward_seconds", "stage_seconds"))
    for row in heads:
        row |= {"of_forward": row["head_seconds"] / forward, "of_stage": row["head_seconds"] / stage}
        row["step_of_stage"] = row["step_seconds"] / stage
    rows = heads + [bench.measure_backend(*how) for how in product(args.backends, (False, True))]
    results.publish("head_cost", args, rows, argv)


class Bench:
    """A stage, its input, and the heads to put on it."""

    def __init__(self, args: Namespace) -> None:
        self.device, self.repeats = args.device, args.repeats
        self.to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        self.lm = LMConfig(args.vocab_size, args.seq_length, args.width, args.num_blocks, args.num_heads)
        self.stage = nn.Sequential(*(spec.build() for spec in lm_layers(self.lm)[2:-2])).to(**self.to)
        shape = args.micro_batch_size, args.seq_length
        self.hidden_btd = torch.randn(*shape, args.width, **self.to)
        self.labels_bt = torch.randint(args.vocab_size, shape, device=args.device)

    def head(self, config: HeadConfig) -> nn.Module:
        """An auxiliary head after the stage."""
        layers = lm_layers(self.lm)
        return head_factory(config, layers)(LossHead(stage=0, after_layer=len(layers) - 2)).to(**self.to)

    def run_head(self, head: Any) -> None:
        """Forward and backward of a head, its input's gradient included."""
        hidden_btd = self.hidden_btd.detach().requires_grad_()
        head.loss(hidden_btd, self.labels_bt, lm_loss()).backward()

    def run_stage(self) -> None:
        """Forward and backward of the stage, its input's gradient included."""
        hidden_btd = self.hidden_btd.detach().requires_grad_()
        self.stage(hidden_btd).backward(self.hidden_btd)

    def measure_head(self, setting: str) -> results.Row:
        """One line of the table of heads."""
        print(f"{setting} ...", flush=True)
        head = self.head(HeadConfig(**SETTINGS[setting]))
        # Its products are counted without kernels, which would hide them.
        unfused = self.head(HeadConfig(**(SETTINGS[setting] | {"fused": False})))
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        run_head = partial(self.run_head, head)
        flops = round(FlopMeter(flops_per_second=1.0)(partial(self.run_head, unfused))[0])
        of_stage = stage_flops(self.lm, self.labels_bt.numel())
        return {
            "part": "head",
            "setting": setting,
            "flops": flops,
            "stage_flops": of_stage,
            "of_stage_flops": flops / of_stage,
            "peak_bytes": peak_memory(run_head, self.device),
            "num_trained": sum(parameter.numel() for parameter in trained),
            **self._shortest(
                forward_seconds=partial(self.stage, self.hidden_btd),
                stage_seconds=self.run_stage,
                head_seconds=run_head,
                step_seconds=optimizer.step,
            ),
            "optimizer_bytes": sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        }

    def measure_backend(self, backend: str, frozen: bool) -> results.Row:
        """One line of the table of implementations of the linear cross-entropy."""
        print(f"{backend} ...", flush=True)
        hidden_nd, labels_n = self.hidden_btd.flatten(0, 1), self.labels_bt.flatten()
        weight_vd = torch.empty(self.lm.vocab_size, self.lm.width, **self.to)
        weight_vd.normal_(std=0.02).requires_grad_(not frozen)

        def run() -> None:
            hidden = hidden_nd.detach().requires_grad_()
            if backend in ("torch", TORCH_CHUNKS):
                rows = CHUNK_BYTES // (4 * self.lm.vocab_size)
                chunks = {"batch_chunk_size": rows, "chunking_method": None} if backend == "torch" else {}
                options = nn.LinearCrossEntropyOptions(**chunks)
                loss = F.linear_cross_entropy(hidden, weight_vd, labels_n, reduction="sum", options=options)
            else:
                loss = linear_cross_entropy(hidden, weight_vd, None, labels_n, backend=backend)  # type: ignore[arg-type]
            loss.backward()

        peak_bytes = peak_memory(run, self.device)
        row = {"part": "backend", "setting": backend, "frozen": frozen, "peak_bytes": peak_bytes}
        return row | self._shortest(seconds=run)

    def _shortest(self, **works: Callable[[], Any]) -> dict[str, float]:
        """The shortest time of each of ``works`` in ``--repeats`` turns, after one that is not timed."""
        on_cpu = self.device == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        synchronize = (lambda: None) if on_cpu else torch.accelerator.synchronize
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(self.repeats + 1):
            for name, work in works.items():
                synchronize()
                started = clock()
                work()
                synchronize()
                if turn:
                    seconds[name].append(clock() - started)
        return {name: min(values) for name, values in seconds.items()}


def stage_flops(lm: LMConfig, num_tokens: int) -> int:
    """Matrix-product FLOPs of the blocks' forward and backward, the input's gradient included.

    12 matrices ``d x d``, and attention, 2 t d per token and product, which torch does not count on a CPU.
    """
    return 6 * num_tokens * lm.num_blocks * (12 * lm.width**2 + 2 * lm.seq_length * lm.width)


def peak_memory(work: Callable[[], Any], device: str) -> int:
    """The most bytes that tensors made by ``work`` take at one time."""
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


if __name__ == "__main__":
    main()
