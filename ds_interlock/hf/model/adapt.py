"""Changes to a pretrained model's layers before they train: adapters, freezing, learning rates.

Each function returns one for ``Blueprint.prepare``, which is called with each layer once it has its weights.
Parameters have the names of the Hugging Face model, whatever stage their layer is on. Patterns are regular
expressions, searched anywhere in a name; one that is invalid or matches no parameter is a ConfigError.
"""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.cut import Block, Blueprint, End
from ds_interlock.sampling import seeded

Prepare = Callable[[nn.Module], None]

ALL_LINEAR = "all-linear"


def freeze(patterns: Sequence[str], blueprint: Blueprint) -> Prepare:
    """Freezes the parameters whose names match; gradients still flow through them."""
    return _set_attribute("--freeze", "requires_grad", dict.fromkeys(patterns, False), blueprint)


def scale_learning_rates(scales: Mapping[str, float], blueprint: Blueprint) -> Prepare:
    """Multiplies the learning rate of the parameters whose names match; the first matching pattern counts."""
    wrong = next((f"{pattern}={scale:g}" for pattern, scale in scales.items() if not scale > 0), None)
    if wrong:
        raise ConfigError(f"--learning_rate_scale {wrong}: expected a factor above 0; --freeze is for 0")
    return _set_attribute("--learning_rate_scale", "learning_rate_scale", scales, blueprint)


def _set_attribute(flag: str, attribute: str, values: Mapping[str, float], blueprint: Blueprint) -> Prepare:
    compiled = {_compiled(pattern, flag, blueprint): value for pattern, value in values.items()}

    def prepare(layer: nn.Module) -> None:
        for name, parameter in layer.named_parameters():
            value = next((value for pattern, value in compiled.items() if pattern.search(name)), None)
            if value is not None:
                setattr(parameter, attribute, value)

    return prepare


def _compiled(pattern: str, flag: str, blueprint: Blueprint) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{flag} {pattern}: not a regular expression: {error}") from error
    names = list(blueprint.parameters())
    if not any(map(compiled.search, names)):
        raise ConfigError(f"{flag} {pattern}: no parameter has a name like this; names are like {names[-2]}")
    return compiled


def lora_config(
    blueprint: Blueprint,
    *,
    rank: int,
    alpha: int | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = (ALL_LINEAR,),
) -> Any:
    """Peft's ``LoraConfig`` for adapters in a model's blocks.

    ``alpha`` is by default twice the rank. ``target_modules`` are, as peft takes them, names of linear layers
    in a block, or one regular expression for full names, or "all-linear"; a ConfigError if there is no such
    layer, or no peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("--lora_r needs peft: pip install peft") from error
    anatomy = blueprint.skeleton.anatomy
    paths = [f"{anatomy.blocks}.{number}" for number in range(anatomy.num_blocks)]  # in hybrids they differ
    parts = (pair for path in paths for pair in blueprint.skeleton.original(path).named_modules(prefix=path))
    linear = {name: part for name, part in parts if isinstance(part, nn.Linear | Conv1D)}
    names = sorted({name.rpartition(".")[2] for name in linear})
    targets: Any = names if list(target_modules) == [ALL_LINEAR] else list(target_modules)
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown and len(targets) == 1 and any(_fullmatch(unknown[0], name) for name in linear):
        targets, unknown = unknown[0], []
    if unknown:
        raise ConfigError(
            f"--lora_target_modules {unknown[0]}: no linear layer of a block has this name; expected "
            f"{ALL_LINEAR}, or some of {', '.join(names)}"
        )
    return LoraConfig(
        task_type="CAUSAL_LM" if anatomy.unembedding is not None else "SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in linear.values()),
    )


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return bool(re.fullmatch(pattern, name))
    except re.error:
        return False


def add_lora(config: Any, seed: int) -> Prepare:
    """Puts adapters into the blocks. Only they, and a classifier's new output layers, stay trainable.

    The adapters of a block are drawn from the seed and the block's name, whatever stage the block is on.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import check_target_module_exists

    def prepare(layer: nn.Module) -> None:
        is_new = isinstance(layer, End) and layer.blueprint.skeleton.anatomy.unembedding is None
        layer.requires_grad_(is_new)
        names = [name for name, _ in layer.named_modules()]
        if isinstance(layer, Block) and any(check_target_module_exists(config, name) for name in names):
            with seeded(seed + zlib.crc32(layer.paths[0].encode())):
                inject_adapter_in_model(config, layer)

    return prepare
