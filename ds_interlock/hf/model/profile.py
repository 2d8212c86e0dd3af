"""The profile of a Hugging Face causal language model: timed here, or estimated from its configuration.

Its layers are those that ``launcher/finetune.py`` trains (``hf/model/cut.py``), so that stage bounds planned
with the profile are stage bounds of the job. Weights are random, or on the meta device.
"""

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import TiedLayerSpec
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_interlock.config import HeadConfig
from ds_interlock.heads.lm_loss import lm_loss
from ds_interlock.hf.model.cut import Blueprint
from ds_interlock.hf.model.pretrained import empty_model
from ds_interlock.hf.model.surgery import Skeleton
from ds_interlock.planning.profile import Profile
from ds_interlock.profiling.layers import FlopMeter, MakeOptimizer, Stopwatch
from ds_interlock.profiling.model import calls_in_sequence, device_name, profile_model

_STD = 0.02  # of random weights


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

    ``name`` is what to call the model, ``flops_per_second`` what a device reaches, not its peak, and ``link``
    latency in seconds and bandwidth in bytes per second between two stages. ConfigError if the model cannot
    be cut into layers.
    """
    source = f"estimated: matrix products and attention at {flops_per_second / 1e12:g} TFLOP/s, links of "
    source += f"{link[1] / 1e9:g} GB/s and {link[0] * 1e6:g} us"
    about = {"model": name, "device": "assumed", "source": source}
    device = torch.device("meta")
    layers, tied_layers = _layers(config, torch.bfloat16, device)
    # transformers reads values of meta tensors, but not of this mode's. Buffers outside the layers, such as
    # rotary frequencies, are real tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids_bt = torch.zeros(micro_batch_size, seq_length, dtype=torch.int64, device=device)
        calls = calls_in_sequence((layer.to_empty(device=device) for layer in layers), ids_bt)
        meter = FlopMeter(flops_per_second)
        return profile_model(calls, head, lm_loss(), ids_bt, meter, None, link, tied_layers, **about)


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
) -> Profile:
    """A profile measured here, medians of ``num_rounds``, with random weights; see ``estimate_profile``."""
    accelerator = get_accelerator()
    device = torch.device(accelerator.current_device_name())
    ids_bt = torch.randint(config.vocab_size, (micro_batch_size, seq_length), device=device)
    layers, tied_layers = _layers(config, dtype, device)
    calls, meter = calls_in_sequence(layers, ids_bt), Stopwatch(accelerator.synchronize, num_rounds)
    source = f"measured on {device_name(device)}" + ("" if link else "; the link was not measured")
    about = {"model": name, "device": device_name(device), "source": source}
    return profile_model(calls, head, lm_loss(), ids_bt, meter, make_optimizer, link, tied_layers, **about)


def _layers(config: Any, dtype: torch.dtype, device: torch.device) -> tuple[list[nn.Module], tuple[int, ...]]:
    """The layers of a job, as they train, and the numbers of those that a job would tie."""

    def values(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Tensors that are not on the meta device are buffers with their values.
        weights = {name: like for name, like in layer.items() if like.is_meta}
        return {n: torch.empty_like(like, device=device).normal_(std=_STD) for n, like in weights.items()}

    skeleton = Skeleton(empty_model(config, "causal", dtype))
    tied = enumerate(Blueprint(skeleton, values).layers())
    # A tied unembedding has a weight of its own: the last stage has a copy, and steps it.
    layers = [spec.build() for spec in Blueprint(skeleton, values, tie=False).layers()]
    numbers = tuple(number for number, spec in tied if isinstance(spec, TiedLayerSpec))
    return [layer.to(device).train() for layer in layers], numbers
