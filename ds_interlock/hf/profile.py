"""The profile of a Hugging Face causal language model: timed here, or estimated from its configuration."""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_interlock.config import HeadConfig
from ds_interlock.hf.layers import build_model, layer_calls
from ds_interlock.models.lm import lm_loss
from ds_interlock.pipe.measure import FlopMeter, MakeOptimizer, Stopwatch
from ds_interlock.pipe.profile_model import device_name, profile_model
from ds_interlock.planning.profile import Profile


def estimate_profile(
    name: str,
    config: Any,
    head: HeadConfig,
    *,
    micro_batch_size: int,
    seq_length: int,
    flops_per_second: float,
    link: tuple[float, float],
) -> Profile:
    """A profile from sizes alone, in bf16: matrix products at an assumed speed. Loads no weights.

    Args:
        name: What to call the model.
        config: Its Hugging Face configuration.
        head: The auxiliary heads.
        micro_batch_size: Samples in a micro-batch.
        seq_length: Tokens of a sample.
        flops_per_second: What a device reaches, not its peak.
        link: Latency in seconds and bandwidth in bytes per second between two stages.
    """
    latency_seconds, bandwidth = link
    assumed = (
        f"estimated: matrix products and attention at {flops_per_second / 1e12:g} TFLOP/s, links of "
        f"{bandwidth / 1e9:g} GB/s and {latency_seconds * 1e6:g} us"
    )
    with FakeTensorMode():  # tensors with shapes and no contents
        ids_bt = torch.zeros(micro_batch_size, seq_length, dtype=torch.int64, device="meta")
        calls = layer_calls(build_model(config, torch.bfloat16, ids_bt.device), ids_bt)
        return profile_model(
            calls,
            head,
            lm_loss(),
            ids_bt,
            FlopMeter(flops_per_second),
            None,
            model=name,
            device="assumed",
            source=assumed,
            link=link,
        )


def measure_profile(
    name: str,
    config: Any,
    head: HeadConfig,
    *,
    dtype: torch.dtype,
    micro_batch_size: int,
    seq_length: int,
    make_optimizer: MakeOptimizer,
    num_rounds: int,
    link: tuple[float, float] | None,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """A profile measured on this process's accelerator, with random weights.

    Args:
        name: What to call the model.
        config: Its Hugging Face configuration.
        head: The auxiliary heads.
        dtype: Of weights and activations.
        micro_batch_size: Samples in a micro-batch.
        seq_length: Tokens of a sample.
        make_optimizer: Makes the optimizer of a list of parameters.
        num_rounds: Rounds each time is the median of.
        link: Latency in seconds and bandwidth in bytes per second between two stages, if known.
        progress: Told what is being measured.
    """
    accelerator = get_accelerator()
    device = torch.device(accelerator.current_device_name())
    model = build_model(config, dtype, device)
    ids_bt = torch.randint(config.vocab_size, (micro_batch_size, seq_length), device=device)
    measured = f"measured on {device_name(device)}" + ("" if link else "; the link was not measured")
    return profile_model(
        layer_calls(model, ids_bt),
        head,
        lm_loss(),
        ids_bt,
        Stopwatch(accelerator.synchronize, num_rounds),
        make_optimizer,
        model=name,
        device=device_name(device),
        source=measured,
        link=link,
        progress=progress,
    )
