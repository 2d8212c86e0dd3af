"""All stages of a pipeline on one device: tokens per second and peak memory of every mode.

    python -m benchmarks.single_gpu --model_size 355M --output single_gpu.json

A GPT-2-shaped language model (``ds_interlock/models/lm.py``) is trained with AdamW by
``InProcessPipeline``: K virtual stages, one after the other on one device, random tokens. There is no
bubble to save here; it shows the extra work of heads and relays, and how much memory the micro-batches in
flight take. With CUDA weights and activations are bfloat16; on CPU the default is a
small model in float32. Every mode runs in a process of its own, so that peak memory is its own: on CUDA
what torch had allocated, on CPU the memory of the process.

The same device's profile of the model then feeds the planner: what each mode would do on as many such
devices as ``--predict_stages`` says, over links of ``--bandwidth``.
"""

import multiprocessing
import resource
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import results
from benchmarks.language_models import plan_of, stage_bounds
from ds_interlock import HeadConfig, InProcessPipeline, InterlockConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.models.lm import LMConfig, build_lm, lm_layers, lm_loss
from ds_interlock.planning.forecast import compare
from ds_interlock.planning.profile import Profile
from ds_interlock.profiling.layers import Stopwatch
from ds_interlock.profiling.model import calls_in_sequence, device_name, profile_model
from measuring.results import new_figure, table_of

# The shapes of GPT-2 (Radford et al. 2019, table 2), between them one of 760 M, and a small one for CPUs.
MODEL_SIZES: dict[str, dict[str, int]] = {
    "3M": {"width": 128, "num_blocks": 8, "num_heads": 4, "vocab_size": 4096},
    "125M": {"width": 768, "num_blocks": 12, "num_heads": 12, "vocab_size": 50257},
    "355M": {"width": 1024, "num_blocks": 24, "num_heads": 16, "vocab_size": 50257},
    "760M": {"width": 1280, "num_blocks": 36, "num_heads": 20, "vocab_size": 50257},
    "1B": {"width": 1600, "num_blocks": 32, "num_heads": 25, "vocab_size": 50257},
}
GLOBAL = "global"
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
    context = multiprocessing.get_context("spawn")
    rows = []
    for mode in (GLOBAL, *args.modes):
        print(f"{mode} ...", flush=True)
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (mode, args)))
    print("profile ...", flush=True)
    with context.Pool(1) as pool:
        profile = Profile.model_validate_json(pool.apply(measure_profile, (args,)))
    predictions = [each for num_stages in args.predict_stages for each in predict(profile, args, num_stages)]
    more = {"profile": profile.model_dump(), "predictions": predictions}
    return results.publish("single_gpu", args, rows, argv, **more)


def measure(mode: str, args: Namespace) -> dict[str, Any]:
    """In a process of its own: trains some batches under ``mode``."""
    torch.set_num_threads(1)  # on CPU: others may want the other cores
    device = torch.device(args.device)
    net = _model(mode, args).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    ids_mbt = torch.randint(
        MODEL_SIZES[args.model_size]["vocab_size"],
        (args.micro_batches, args.micro_batch_size, args.seq_length + 1),
        device=device,
    )
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
        "peak_bytes": _peak_bytes(device),
    }


def measure_profile(args: Namespace) -> str:
    """In a process of its own: the profile of the model on the device, as JSON."""
    torch.set_num_threads(1)
    device = torch.device(args.device)
    config = LMConfig(**MODEL_SIZES[args.model_size], seq_length=args.seq_length)
    net = build_lm(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    ids_bt = torch.randint(config.vocab_size, (args.micro_batch_size, args.seq_length + 1), device=device)
    return profile_model(
        calls_in_sequence(net, ids_bt[:, :-1]),
        HeadConfig(token_fraction=args.token_fraction),
        lm_loss(),
        ids_bt[:, 1:],
        Stopwatch(torch.cuda.synchronize if device.type == "cuda" else lambda: None),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        model=args.model_size,
        device=device_name(device),
        source=f"measured on {device_name(device)}; links of {args.bandwidth:g} GB/s assumed",
        link=(_LATENCY_SECONDS, 1e9 * args.bandwidth),
    ).model_dump_json()


def predict(profile: Profile, args: Namespace, num_stages: int) -> list[dict[str, Any]]:
    """What the planner says of ``num_stages`` such devices; none if the model has too few layers."""
    if num_stages > len(profile.layers):
        return []
    configured = InterlockConfig(mode="local", head=HeadConfig(token_fraction=args.token_fraction))
    comparison = compare(configured, profile, args.micro_batches, num_stages=num_stages)
    return [
        {
            "stages": num_stages,
            "setting": each.name,
            "seconds": each.batch_seconds,
            "times_global": each.speed,
            "bubble_fraction": each.bubble_fraction,
            "head_share": each.head_share,
            "activation_bytes": max(each.activation_bytes),
        }
        for each in comparison.others
    ]


def _model(mode: str, args: Namespace) -> InProcessPipeline:
    torch.manual_seed(0)
    config = LMConfig(**MODEL_SIZES[args.model_size], seq_length=args.seq_length)
    plan = plan_of(WINDOWS.get(mode), stage_bounds(config, args.stages))
    head = HeadConfig(token_fraction=args.token_fraction)
    return InProcessPipeline(build_lm(config), lm_loss(), plan, head_factory(head, lm_layers(config)))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def draw(found: dict[str, Any]) -> Any:
    """Tokens per second and peak memory, a bar for each mode."""
    figure, axes = new_figure(2, f"{found['arguments']['model_size']} parameters on one device")
    modes = [row["mode"] for row in found["rows"]]
    axes[0, 0].bar(modes, [row["tokens_per_second"] for row in found["rows"]])
    axes[0, 0].set_ylabel("tokens per second")
    axes[0, 1].bar(modes, [row["peak_bytes"] / 2**30 for row in found["rows"]])
    axes[0, 1].set_ylabel("peak memory, GiB")
    return figure


if __name__ == "__main__":
    main()
