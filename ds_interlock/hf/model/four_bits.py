"""The blocks' linear weights in 4 bits, by bitsandbytes: QLoRA trains adapters beside them.

    nn.Linear   weight  ──FourBits.replace──►  Linear4bit   weight            two codes in a byte
                                                            weight.absmax ... the scale of each 64 codes
    layer files ──in_full──► the weights that the codes stand for

A stage does so block by block, as it reads them, and so never holds more than one of its own in full.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.cut import Block, Blueprint, Values

_SCALES = ".quant_state.bitsandbytes__"  # in a name of what bitsandbytes saves beside each weight


@dataclass(frozen=True)
class FourBits:
    """How weights are kept in 4 bits, as transformers' ``BitsAndBytesConfig`` says it.

    ConfigError without bitsandbytes.
    """

    quant_type: Literal["nf4", "fp4"] = "nf4"
    nested: bool = False
    """Whether the scales are in 8 bits, with scales of their own."""

    def __post_init__(self) -> None:
        _bitsandbytes("--load_in_4bit")

    def replace(self, layer: nn.Module) -> None:
        """Puts 4-bit layers in the place of a block's linear ones; a function for ``Blueprint.prepare``."""
        if not isinstance(layer, Block):
            return
        linear = list(_linear_layers(layer))
        if not linear:
            raise ConfigError(
                f"--load_in_4bit: {layer.paths[0]} has no nn.Linear, and no other layer goes into 4 bits: "
                "leave the flag out for this model"
            )
        for name, module in linear:
            layer.set_submodule(name, self._linear(module))
        block: Any = layer
        block.is_loaded_in_4bit = True  # peft looks for this

    def rounded(self, blueprint: Blueprint) -> Values:
        """The model's values as they are used: what the codes of 4-bit weights stand for, in full."""
        anatomy = blueprint.skeleton.anatomy
        paths = [f"{anatomy.blocks}.{number}" for number in range(anatomy.num_blocks)]
        names = {
            f"{path}.{name}.weight"
            for path in paths
            for name, _ in _linear_layers(blueprint.skeleton.original(path))
        }

        def values(wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: _dequantised(self._codes(value)) if name in names else value
                for name, value in blueprint.values(wanted).items()
            }

        return values

    def _codes(self, weight: Tensor) -> Any:
        """The parameter in 4 bits, on the device that computes with it."""
        nn4 = _bitsandbytes("--load_in_4bit").nn
        parameter = nn4.Params4bit(weight, quant_type=self.quant_type, compress_statistics=self.nested)
        return parameter.to(get_accelerator().current_device_name())

    def _linear(self, linear: nn.Linear) -> nn.Module:
        """The same layer in 4 bits."""
        nn4 = _bitsandbytes("--load_in_4bit").nn
        sizes = linear.in_features, linear.out_features
        module: nn.Linear = nn4.Linear4bit(*sizes, False, linear.weight.dtype, device="meta")
        module.weight, module.bias = self._codes(linear.weight.detach()), linear.bias
        # On CPUs with bfloat16, an evaluation would pack the codes anew, in a form that does not train.
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        module.register_load_state_dict_pre_hook(_load_scales)  # type: ignore[no-untyped-call]
        return module


def _linear_layers(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Those that transformers puts into 4 bits, too."""
    return ((name, part) for name, part in block.named_modules() if type(part) is nn.Linear)


def _load_scales(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Takes the scales from a checkpoint; torch, which goes by the names of parameters, takes the codes."""
    weight = module.weight
    scales = {name: state.pop(name) for name in list(state) if name.startswith(f"{prefix}weight.")}
    if scales:
        functional = _bitsandbytes("this checkpoint").functional
        weight.quant_state = functional.QuantState.from_dict(scales, weight.device)


def in_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors; those in 4 bits as they are used, in the dtype that they had before."""
    full = dict(tensors)
    for name in [name.partition(_SCALES)[0] for name in tensors if _SCALES in name]:
        functional = _bitsandbytes("this checkpoint, whose weights are in 4 bits,").functional
        scales = {other: full.pop(other) for other in tensors if other.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(scales, torch.device("cpu"))
        full[name] = functional.dequantize_4bit(full[name], state)
    return full


def _dequantised(parameter: Any) -> Tensor:
    functional = _bitsandbytes("--load_in_4bit").functional
    weight: Tensor = functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return weight


def _bitsandbytes(what: str) -> ModuleType:
    """The package, which is only imported where it is used: it takes seconds."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(f"{what} needs bitsandbytes: pip install bitsandbytes") from error
    module: ModuleType = bitsandbytes
    return module
