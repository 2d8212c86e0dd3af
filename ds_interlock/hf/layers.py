"""The layers of a Hugging Face causal language model, in order, each with what it is called with.

The model itself is run once and watched: the blocks are its largest list of modules, and the other
layers are the modules beside that list that have weights (embeddings in front, a norm behind), and the
unembedding. No architecture is named here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ds_interlock.errors import ConfigError
from ds_interlock.pipe.measure import LayerCall


def load_config(name: str) -> Any:
    """The configuration of a model: a folder, a ``config.json``, or a name on the hub.

    Raises:
        ConfigError: If there is none.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        detail = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"--model {name}: no Hugging Face configuration could be loaded ({detail}); give a folder with a "
            "config.json, or a model's name on the hub"
        ) from error


def build_model(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal language model with random weights; on the meta device with none.

    Raises:
        ConfigError: If transformers has no such model for this configuration.
    """
    config.use_cache = False
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigError(
            f"--model: {type(config).__name__} is not a causal language model: {error}"
        ) from error
    assert isinstance(model, nn.Module)
    return model.train()


def layer_calls(model: nn.Module, ids_bt: Tensor) -> list[LayerCall]:
    """The layers in the order of their calls on ``ids_bt``.

    Raises:
        ConfigError: If the model's blocks cannot be made out.
    """
    layers = dict(_layers(model))
    calls: list[LayerCall] = []
    with _watched(layers, calls), torch.no_grad():
        model(input_ids=ids_bt, use_cache=False)
    missing = [name for name in layers if name not in {call.name for call in calls}]
    if missing:
        raise ConfigError(f"--model: the layers {', '.join(missing)} take no part in the model's forward")
    return calls


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"--model: {type(model).__name__} has no list of blocks to cut into stages")
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    owner = model.get_submodule(name.rpartition(".")[0])
    for child_name, child in owner.named_children():
        if child is blocks:
            yield from ((f"{name}.{number}", block) for number, block in enumerate(blocks))
        elif next(child.parameters(), None) is not None:
            yield f"{name.rpartition('.')[0]}.{child_name}".lstrip("."), child
    unembedding = model.get_output_embeddings()  # type: ignore[operator]
    yield "lm_head", unembedding


@contextmanager
def _watched(layers: dict[str, nn.Module], calls: list[LayerCall]) -> Iterator[None]:
    """Notes every call of a layer."""

    def watch(name: str) -> Any:
        return lambda module, inputs, options: calls.append(LayerCall(name, module, inputs, options))

    handles = [
        layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
