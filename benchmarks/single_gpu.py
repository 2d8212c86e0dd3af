"""All stages of a pipeline on one device: tokens per second and peak memory of every mode.

    python -m benchmarks.single_gpu --model_size 355M --output single_gpu.json

A GPT-2-shaped language model is trained with AdamW: K virtual stages, one after the other on one device,
random tokens, with CUDA in bfloat16. There is no bubble to save here; it shows the extra work of heads and
relays, and how much memory the micro-batches in flight take. Every mode runs in a process of its own, so
that peak memory is its own: on CUDA what torch had allocated, on CPU the memory of the process.

The same device's profile of the model then feeds the planner: what each mode would do on as many such
devices as ``--predict_stages`` says, over links of ``--bandwidth``.
"""

import multiprocessing
import resource
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import results
from benchmarks.language_models import GLOBAL, plan_of, stage_bounds
from ds_interlock import HeadConfig, InProcessPipeline, InterlockConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.planning.forecast import compare
from ds_interlock.planning.profile import Profile
from ds_interlock.profiling.layers import Stopwatch
from ds_interlock.profiling.model import calls_in_sequence, device_name, profile_model
from measuring.results import table_of

# The shapes of GPT-2 (Radford et al. 2019, table 2), between them one of 760 M, and a small one for CPUs.
MODEL_SIZES: dict[str, dict[str, int]] = {
    "3M": {"width": 128, "num_blocks": 8, "num_heads": 4, "vocab_size": 4096},
    "125M": {"width": 768, "num_blocks": 12, "num_heads": 12, "vocab_size": 50257},
    "355M": {"width": 1024, "num_blocks": 24, "num_heads": 16, "vocab_size": 50257},
    "760M": {"width": 1280, "num_blocks": 36, "num_heads": 20, "vocab_size": 50257},
    "1B": {"width": 1600, "num_blocks": 32, "num_heads": 25, "vocab_size": 50257},
}
_LATENCY_SECONDS = 20e-6
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
    "predict_stages": ([4, 8, 16], "devices to predict for"),
    "bandwidth": (25.0, "of a link, GB/s, in predictions"),
    "batches": (5, "timed, after one that is not"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints the table and returns the results."""
    args = results.parse(__doc__, OPTIONS, argv)
    rows = [in_new_process(measure, mode, args) for mode in (GLOBAL, *args.modes)]
    profile = in_new_process(measure_profile, "profile", args)
    predictions = [row for num_stages in args.predict_stages for row in predict(profile, args, num_stages)]
    more = {"profile": profile.model_dump(), "predictions": predictions}
    return results.publish("single_gpu", args, rows, argv, **more)


def in_new_process(work: Callable[[str, Namespace], Any], name: str, args: Namespace) -> Any:
    print(f"{name} ...", flush=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (name, args))


def measure(mode: str, args: Namespace) -> results.Row:
    """In a process of its own: trains some batches under ``mode``."""
    lm, to = _set_up(args)
    plan = plan_of(WINDOWS.get(mode), stage_bounds(lm, args.stages))
    heads = head_factory(HeadConfig(token_fraction=args.token_fraction), lm_layers(lm))
    net = InProcessPipeline(build_lm(lm), lm_loss(), plan, heads).to(**to)
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
        if _is_cuda(args)
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_profile(name: str, args: Namespace) -> Profile:
    """In a process of its own: the profile of the model on the device."""
    lm, to = _set_up(args)
    net = build_lm(lm).to(**to)
    ids_bt = torch.randint(lm.vocab_size, (args.micro_batch_size, args.seq_length + 1), device=args.device)
    device = device_name(torch.device(args.device))
    return profile_model(
        calls_in_sequence(net, ids_bt[:, :-1]),
        HeadConfig(token_fraction=args.token_fraction),
        lm_loss(),
        ids_bt[:, 1:],
        Stopwatch(torch.cuda.synchronize if _is_cuda(args) else lambda: None),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        model=args.model_size,
        device=device,
        source=f"measured on {device}; links of {args.bandwidth:g} GB/s assumed",
        link=(_LATENCY_SECONDS, 1e9 * args.bandwidth),
    )


def predict(profile: Profile, args: Namespace, num_stages: int) -> list[results.Row]:
    """What the planner says of ``num_stages`` such devices; none if the model has too few layers."""
    if num_stages > len(profile.layers):
        return []
    interlock = InterlockConfig(mode="local", head=HeadConfig(token_fraction=args.token_fraction))
    return [
        {
            "stages": num_stages,
            "setting": forecast.name,
            "seconds": forecast.batch_seconds,
            "times_global": forecast.speed,
            "bubble_fraction": forecast.bubble_fraction,
            "head_share": forecast.head_share,
            "activation_bytes": max(forecast.activation_bytes),
        }
        for forecast in compare(interlock, profile, args.micro_batches, num_stages=num_stages).others
    ]


def _set_up(args: Namespace) -> tuple[LMConfig, dict[str, Any]]:
    """The model's sizes, and to where and to which type it is to be moved."""
    torch.set_num_threads(1)  # on CPU: others may want the other cores
    torch.manual_seed(0)
    lm = LMConfig(**MODEL_SIZES[args.model_size], seq_length=args.seq_length)
    return lm, {"device": args.device, "dtype": torch.bfloat16 if _is_cuda(args) else torch.float32}


def _is_cuda(args: Namespace) -> bool:
    return torch.device(args.device).type == "cuda"


def table(found: dict[str, Any]) -> str:
    """Speed and memory of every mode, then the predictions, as Markdown."""
    measured = {
        "mode": "mode",
        "tokens/s": "tokens_per_second",
        "relative to global": ("tokens_per_second", found["rows"][0]["tokens_per_second"]),
        "peak GiB": ("peak_bytes", 2**30),
        "parameters": "layer_parameters",
        "in heads": "head_parameters",
    }
    predicted = {
        "stages": "stages",
        "setting": "setting",
        "predicted s/batch": "seconds",
        "times global": "times_global",
        "bubble %": ("bubble_fraction", 0.01),
        "heads %": ("head_share", 0.01),
        "activations GiB": ("activation_bytes", 2**30),
    }
    return f"{table_of(found['rows'], measured)}\n\n{table_of(found['predictions'], predicted)}"


if __name__ == "__main__":
    main()
