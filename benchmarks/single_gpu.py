"""All stages of a pipeline on one device: tokens per second and peak memory of every mode.

    python -m benchmarks.single_gpu --model_size 355M --output single_gpu.json

A GPT-2-shaped language model is trained with AdamW: K virtual stages, one after the other on one device,
random tokens, with CUDA in bfloat16. There is no bubble to save here; it shows the extra work of heads and
relays, and how much memory the micro-batches in flight take. Every mode runs in a process of its own, so
that peak memory is its own: on CUDA what torch had allocated, on CPU the memory of the process.
"""

import multiprocessing
import resource
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence

import torch

from benchmarks import results
from benchmarks.language_models import GLOBAL, pipeline_of
from ds_interlock import HeadConfig
from ds_interlock.models.lm import LMConfig

# The shapes of GPT-2 (Radford et al. 2019, table 2), between them one of 760 M, and a small one for CPUs.
MODEL_SIZES: dict[str, dict[str, int]] = {
    "3M": {"width": 128, "num_blocks": 8, "num_heads": 4, "vocab_size": 4096},
    "125M": {"width": 768, "num_blocks": 12, "num_heads": 12, "vocab_size": 50257},
    "355M": {"width": 1024, "num_blocks": 24, "num_heads": 16, "vocab_size": 50257},
    "760M": {"width": 1280, "num_blocks": 36, "num_heads": 20, "vocab_size": 50257},
    "1B": {"width": 1600, "num_blocks": 32, "num_heads": 25, "vocab_size": 50257},
}
WINDOWS = {"local": 1, "window 1.25": 1.25, "window 2": 2, "window 3": 3}
_ON_GPU = torch.cuda.is_available()
OPTIONS: results.Options = {
    "device": ("cuda" if _ON_GPU else "cpu", "as torch names it"),
    "model_size": ("125M" if _ON_GPU else "3M", "parameters", MODEL_SIZES),
    "modes": (list(WINDOWS), "measured beside global", WINDOWS),
    "stages": (4, "virtual pipeline stages"),
    "micro_batches": (8, "of a batch"),
    "micro_batch_size": (8 if _ON_GPU else 1, "sequences of a micro-batch"),
    "seq_length": (1024 if _ON_GPU else 64, "tokens of a sequence"),
    "token_fraction": (0.125, "interlock.head.token_fraction"),
    "batches": (5, "timed, after one that is not"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and publishes."""
    args = results.parse(__doc__, OPTIONS, argv)
    rows = []
    for mode in (GLOBAL, *args.modes):
        print(f"{mode} ...", flush=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (mode, args)))
    results.publish("single_gpu", args, rows, argv)


def measure(mode: str, args: Namespace) -> results.Row:
    """In a process of its own: trains some batches under ``mode``."""
    torch.set_num_threads(1)  # on CPU: others may want the other cores
    torch.manual_seed(0)
    lm = LMConfig(**MODEL_SIZES[args.model_size], seq_length=args.seq_length)
    on_gpu = torch.device(args.device).type == "cuda"
    heads = HeadConfig(token_fraction=args.token_fraction)
    net = pipeline_of(lm, WINDOWS.get(mode), args.stages, heads)
    net.to(args.device, torch.bfloat16 if on_gpu else torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    shape = args.micro_batches, args.micro_batch_size, args.seq_length + 1
    ids_mbt = torch.randint(lm.vocab_size, shape, device=args.device)
    micro_batches = [(ids_bt[:, :-1], ids_bt[:, 1:]) for ids_bt in ids_mbt]
    seconds = []
    for _ in range(1 + args.batches):
        start = time.perf_counter()
        losses = net.accumulate_gradients(micro_batches)
        optimizer.step()
        optimizer.zero_grad()
        losses[net.plan.final].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    batch_seconds = statistics.median(seconds[1:])
    return {
        "mode": mode,
        "layer_parameters": sum(p.numel() for name, p in net.named_parameters() if "heads." not in name),
        "head_parameters": sum(p.numel() for p in net.heads.parameters()),
        "seconds": batch_seconds,
        "tokens_per_second": args.micro_batches * args.micro_batch_size * args.seq_length / batch_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(args.device)
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
