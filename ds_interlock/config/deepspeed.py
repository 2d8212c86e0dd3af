"""The DeepSpeed config around the section: reading the file, and refusing what no pipeline here can do."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson

from ds_interlock.config.faults import shown_as_json
from ds_interlock.errors import ConfigError, list_faults

DEFAULT_RATES: dict[str, dict[str, Any]] = {
    "WarmupDecayLR": {"warmup_max_lr": 1e-3},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-3},
}
"""Of DeepSpeed's schedulers that give every group one rate; the others take the optimizer's, or need it."""


@dataclass(frozen=True)
class Refusal:
    """A DeepSpeed setting that the engine cannot work with."""

    key: str
    values: tuple[object, ...]
    reason: str
    switch: str | None = None  # a key that must be true for the setting to count


REFUSALS = (
    Refusal(
        "fp16.enabled",
        (True,),
        "fp16 needs loss scaling: on an overflow anywhere all stages have to skip the same step and take the "
        'same new scale, so no stage could step on its own. Use "bf16": {"enabled": true}, which needs no '
        "scale",
    ),
    Refusal(
        "zero_optimization.stage",
        (2, 3),
        "ZeRO 2 and 3 partition gradients (3: weights too) in a backward pass as if it were the only one; "
        "here gradients accumulate over several. DeepSpeed's own pipeline refuses these too. Use 0 or 1",
    ),
    Refusal(
        "pipeline.use_reentrant",
        (True,),
        "re-entrant activation checkpointing allows one backward pass per forward and no gradient with "
        "respect to the input alone; to relay gradients, a stage needs both. Use false",
    ),
    Refusal(
        "torch_autocast.dtype",
        ("float16", "fp16", "half", "torch.float16"),
        'it needs loss scaling, as fp16 does. Use "bfloat16"',
        switch="torch_autocast.enabled",
    ),
    Refusal(
        "flops_profiler.enabled",
        (True,),
        "DeepSpeed prints its profile in engine.step(), which no pipeline calls, not even its own. Use "
        "`ds-interlock profile` for seconds, or leave the section out",
    ),
    Refusal(
        "checkpoint.writer.decoupled",
        (True,),
        "DeepSpeed completes such a checkpoint in engine.step(), which no pipeline calls. Use false",
    ),
    Refusal(
        "checkpoint.load_universal",
        (True,),
        "universal checkpoints have no heads, and a checkpoint as it is resumes with other numbers of stages "
        "and replicas. Leave it out",
    ),
    Refusal(
        "steps_per_print",
        (None,),
        "DeepSpeed prints the times of wall_clock_breakdown every steps_per_print batches, and fails without "
        "it. Give a number",
        switch="wall_clock_breakdown",
    ),
)

MUST_AGREE = (
    *("interlock", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("optimizer", "scheduler", "gradient_clipping", "zero_optimization", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
    *("disable_allgather", "sparse_gradients", "pipeline", "activation_checkpointing", "checkpoint"),
    *("elasticity", "compression_training", "curriculum_learning", "data_efficiency", "tensor_parallel"),
    *("progressive_layer_drop", "managed_gradient_accumulation"),
)
"""The sections and keys that all ranks of a job must share: they decide on numbers and messages. The others
are a rank's own: what it prints, where it writes, and what scripts keep in the same file."""

MAY_DIFFER = (  # the exceptions in these sections
    *("interlock.timeout_seconds", "interlock.setup_timeout_seconds"),
    *("interlock.checkpoint_timeout_seconds", "interlock.trace.path"),
    *("zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_param.nvme_path"),
)


_FILLED_IN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
)
"""Where transformers' Trainer takes "auto" and DeepSpeed does not. (Elsewhere it stands for the default.)"""


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for DeepSpeed settings that this engine cannot work with, in any mode."""
    faults = []
    for refusal in REFUSALS:
        value = _value(config, refusal.key)
        if value in refusal.values and (refusal.switch is None or _value(config, refusal.switch) is True):
            faults.append(f"{refusal.key}: {shown_as_json(value)} is not supported: {refusal.reason}")
    if faults:
        raise ConfigError(list_faults("DeepSpeed config", faults))


def check_filled_in(config: Mapping[str, Any]) -> None:
    """Raises ConfigError if something is "auto" that has no such value in DeepSpeed; names all of it."""
    unknown = [key for key in _FILLED_IN if _value(config, key) == "auto"]
    for section in ("optimizer", "scheduler"):
        params = _value(config, f"{section}.params")
        if isinstance(params, Mapping):
            unknown += [f"{section}.params.{key}" for key, value in params.items() if value == "auto"]
    if unknown:
        raise ConfigError(
            f'DeepSpeed config: {", ".join(unknown)}: "auto" is for transformers\' Trainer to fill in; give '
            "values"
        )


def _value(config: Mapping[str, Any], path: str) -> Any:
    """What the config says at a path like ``fp16.enabled``; None if nothing."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def read_deepspeed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a DeepSpeed config file as DeepSpeed does: as JSON with comments, but without a key twice."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the DeepSpeed config: {error}") from error
    try:
        contents = hjson.loads(text, object_pairs_hook=_object) if text.strip() else None
    except hjson.HjsonDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path}: {where}: not valid JSON: {error.msg}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(contents, dict):
        raise ConfigError(f"{path}: got {shown_as_json(contents)}, expected a JSON object")
    return contents


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        named = ", ".join(f'"{key}"' for key in twice)
        raise ConfigError(f"the same object has {named} more than once: keep one of them")
    return dict(pairs)
