"""The profile of a model from the calls of its layers: each layer, a head, the loss, by one meter."""

from collections.abc import Callable, Iterable
from typing import cast

import deepspeed
import torch
from torch import Tensor, nn

import ds_interlock
from ds_interlock.config import HeadConfig
from ds_interlock.heads.factory import AuxiliaryHead, LossFn, head_factory
from ds_interlock.heads.output_layers import first_tensor, has_weights
from ds_interlock.planning.profile import Profile
from ds_interlock.profiling.layers import (
    FlopMeter,
    LayerCall,
    MakeOptimizer,
    Meter,
    loss_seconds,
    profile_head,
    profile_layers,
)
from ds_interlock.schedule.plan import LossHead


@torch.no_grad()
def calls_in_sequence(layers: Iterable[nn.Module], inputs: Tensor) -> list[LayerCall]:
    """The calls of layers that take one another's result, as those of a ``PipelineModule`` do."""
    calls = []
    for number, layer in enumerate(layers):
        calls.append(LayerCall(f"{number} {type(layer).__name__}", layer, (inputs,)))
        inputs = layer(inputs)
    return calls


def profile_model(
    calls: list[LayerCall],
    head_config: HeadConfig,
    loss_fn: LossFn,
    labels_bt: Tensor,
    meter: Meter,
    make_optimizer: MakeOptimizer | None,
    link: tuple[float, float] | None = None,
    tied_layers: tuple[int, ...] = (),
    **about: str,
) -> Profile:
    """Measures everything a plan of this model depends on.

    The last of ``calls`` with weights makes the outputs from a hidden state ``[b, t, d]``. Heads of type
    ``auto`` are those of a model that is not pretrained, unless they learn from a base model. ``link`` is
    latency in seconds and bandwidth in bytes per second between two stages, if known. Where nothing runs
    ``make_optimizer`` is None. ``about`` is the profile's ``model``, ``device`` and ``source``.
    """
    head_config = head_config.resolve(pretrained=head_config.needs_base)
    layers = profile_layers(calls, meter, make_optimizer)
    unembedding = next(call for call in reversed(calls) if has_weights(call.module))
    hidden_btd = first_tensor([value for value in unembedding.inputs if isinstance(value, Tensor)]).detach()
    head = _head(head_config.model_copy(update={"blocks": 0}), calls, hidden_btd)
    head_loss = _head_loss(head, head_config, loss_fn, labels_bt, meter)
    head_profile = profile_head(head, head_loss, hidden_btd, meter, make_optimizer, head_config.type)
    block, blocks = layers[_middle(calls) - 1], head_config.blocks
    passes = block.forward_seconds + block.input_gradient_seconds + block.weight_gradient_seconds
    copied = head.parameters() if head_config.type == "shared" else ()
    head_profile = head_profile.model_copy(
        update={
            "blocks": (blocks,) if isinstance(blocks, int) else blocks,
            "block_seconds": passes * head_config.sequence_fraction,
            "block_optimizer_seconds": block.optimizer_seconds,
            "copy_bytes": sum(p.nbytes for p in copied if not p.requires_grad),
        }
    )
    last = calls[-1]
    with torch.no_grad():
        outputs = first_tensor(last.module(*last.inputs, **last.options))
    latency_seconds, bandwidth = link or (0.0, None)
    return Profile(
        **about,
        dtype=str(hidden_btd.dtype).removeprefix("torch."),
        micro_batch_size=labels_bt.shape[0],
        seq_length=labels_bt.shape[1],
        layers=tuple(layers),
        head=head_profile,
        loss_seconds=loss_seconds(lambda outputs: loss_fn(outputs, labels_bt), outputs, meter),
        label_bytes=labels_bt.nbytes,
        tied_layers=tied_layers,
        latency_seconds=latency_seconds,
        bandwidth_bytes_per_second=bandwidth,
        versions={package.__name__: package.__version__ for package in (torch, deepspeed, ds_interlock)},
    )


def device_name(device: torch.device) -> str:
    """What people call ``device``; of a CPU with how many threads, which times depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def _head(config: HeadConfig, calls: list[LayerCall], hidden_btd: Tensor) -> nn.Module:
    """A head as the pipeline would build it after the middle of the model."""
    make_head = head_factory(config, [call.module for call in calls])
    before = torch.get_default_dtype()
    torch.set_default_dtype(hidden_btd.dtype)
    try:
        with hidden_btd.device:
            return make_head(LossHead(stage=0, after_layer=_middle(calls))).train()
    finally:
        torch.set_default_dtype(before)


def _middle(calls: list[LayerCall]) -> int:
    """After so many layers a head is profiled."""
    return len(calls) // 2


def _head_loss(
    head: nn.Module, config: HeadConfig, loss_fn: LossFn, labels_bt: Tensor, meter: Meter
) -> Callable[[Tensor], Tensor]:
    """From a hidden state to the head's loss, on the share of positions it is computed on."""
    # Which positions are drawn depends on labels. Where these have no contents: as many, but the first.
    chosen = max(1, round(config.token_fraction * labels_bt.shape[1]))
    sequences = max(1, round(config.sequence_fraction * labels_bt.shape[0]))
    normaliser_1 = torch.full((1,), float(labels_bt.numel()), device=labels_bt.device)

    places_bt = torch.arange(labels_bt.numel(), device=labels_bt.device).reshape(labels_bt.shape)
    auxiliary = cast(AuxiliaryHead, head)

    def loss(hidden_btd: Tensor) -> Tensor:
        # With hidden states of a base model, if it learns from one: the time does not depend on values.
        base_nd = hidden_btd.detach().flatten(0, -2)
        auxiliary.base_states = dict.fromkeys(config.objectives, base_nd.__getitem__)
        labels = (labels_bt, normaliser_1, places_bt) if config.needs_base else labels_bt
        return auxiliary.loss(hidden_btd, labels, loss_fn)

    def products(hidden_btd: Tensor) -> Tensor:
        of_outputs = [name for name in config.objectives if name != "reconstruction"]
        outputs = [head(hidden_btd[:sequences, :chosen]).sum() for _ in of_outputs]
        if "kl" in of_outputs:  # the base model's outputs
            with torch.no_grad():
                head(hidden_btd.detach()[:sequences, :chosen])
        return torch.stack([hidden_btd.sum(), *outputs]).sum()

    return products if isinstance(meter, FlopMeter) else loss
