"""The first stages with one of their heads, as a smaller model of the same architecture.

    stages     0           1           2                      draft of --stages 2
    layers     embedding   blocks      ...     norm, lm_head      embedding
               blocks      ╰─► head 1                             blocks before head 1
                                                                  norm, lm_head: those of head 1

Such a model is an early exit, or the draft of speculative decoding. A head has the model's own form if it is
a norm and an unembedding. A lens with its translator after the norm folds into one, and so does the
temperature of a shared readout: U((I + A) n + b) = (U (I + A)) n + U b.
"""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.adapter import merged_name, merged_tensors
from ds_interlock.hf.export.checkpoint import FineTunedCheckpoint
from ds_interlock.hf.export.model_folder import MAX_SHARD_SIZE, ExportReport, write_model
from ds_interlock.hf.model.pretrained import empty_model

_Parts = dict[str, dict[str, Tensor]]  # a head's norm, translator, unembedding: tensors by name
_ROWS_AT_ONCE = 8192  # of an unembedding in float64
_FITTING = (
    'a head of type norm_linear or shared, or a lens with "interlock.head.translator": "after_norm", is of '
    "the model's form; train with one of these to export a draft"
)


def export_draft(
    checkpoint: str | Path,
    output: str | PathLike[str],
    num_stages: int,
    head: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Writes the blocks before an auxiliary head, and the head, as a folder for ``from_pretrained``.

    Adapters are merged. The head is in the last of ``num_stages`` stages; ``head`` is the index of its loss
    in the plan, by default the last one in that stage. The other arguments are those of ``export_model``.
    ConfigError if there is no such head, it has another form, or the folder cannot be written.
    """
    source = FineTunedCheckpoint(checkpoint, trust_remote_code=trust_remote_code)
    loss = _choose_head(source, num_stages, head)
    after_layer = source.plan.heads[loss].after_layer
    num_blocks = after_layer - source.description.num_front_layers
    model = empty_model(_shortened_config(source, num_blocks), source.description.architecture)
    whole = source.tensors() if source.description.peft is None else merged_tensors(source)
    before = [state for number, state in source.layers.items() if number < after_layer]
    names = [merged_name(name) for state in before for name in state]
    front = {name: whole[name] for name in names if name in whole}
    tensors = {**front, **_end(source, loss, model, dtype)}
    note = f"blocks 0 to {num_blocks - 1} of {source.description.num_blocks}, with head {loss}"
    return write_model(
        output, source, model, tensors, dtype=dtype, max_shard_size=max_shard_size, notes=[note]
    )


def _choose_head(source: FineTunedCheckpoint, num_stages: int, head: int | None) -> int:
    plan = source.plan
    wanted = source.heads if head is None else {head} & source.heads.keys()
    matching = [loss for loss in wanted if plan.heads[loss].stage == num_stages - 1]
    if matching:
        return matching[-1]
    flags = f"--stages {num_stages}" + ("" if head is None else f" --head {head}")
    known = [
        f"head {loss} in stage {plan.heads[loss].stage} after layer {plan.heads[loss].after_layer - 1} "
        f"(--stages {plan.heads[loss].stage + 1} --head {loss})"
        for loss in source.heads
    ]
    raise ConfigError(
        f"{flags}: there is no such auxiliary head in stage {num_stages - 1}; {source.folder} has "
        f"{', '.join(known) or 'no auxiliary heads at all: it was trained in global mode'}"
    )


def _shortened_config(source: FineTunedCheckpoint, num_blocks: int) -> Any:
    """The model's configuration, for its first ``num_blocks`` blocks and an unembedding of its own."""
    config, of_all = source.load_config(), source.description.num_blocks
    if not 1 <= num_blocks <= of_all:
        where = f"a head after {num_blocks} of {of_all} blocks"
        raise ConfigError(f"{source.folder}: {where} makes no smaller model")
    settings = config.to_dict()
    for name, value in settings.items():
        # One entry for each block, as layer_types; token ids may be a list, too, and of any length.
        if isinstance(value, list) and len(value) == of_all and "token_id" not in name:
            settings[name] = value[:num_blocks]
    settings["architectures"] = [source.description.architecture]
    settings[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = num_blocks
    settings["tie_word_embeddings"] = False
    try:
        return type(config).from_dict(settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{type(config).__name__} cannot be cut to {num_blocks} blocks: {str(error).strip()}"
        ) from error


def _end(source: FineTunedCheckpoint, loss: int, model: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    description = source.description
    if description.unembedding is None:
        raise ConfigError(f"--stages: {description.architecture} ends in no unembedding that a head could be")
    parts = _read_parts(source, loss, model)
    if "translator" in parts:
        has_bias = model.get_submodule(description.unembedding).bias is not None
        parts = _fold(parts, has_bias, dtype, f"head {loss}")
    paths = {"unembedding": description.unembedding, "norm": description.norm}
    return {
        f"{path}.{name}": tensor
        for part, path in paths.items()
        for name, tensor in parts.get(part, {}).items()
    }


def _read_parts(source: FineTunedCheckpoint, loss: int, model: Any) -> _Parts:
    parts: _Parts = {}
    for full_name, tensor in source.heads[loss].items():
        part, _, name = full_name.removeprefix("readout.").partition(".")
        parts.setdefault(part, {})[name] = tensor
    if "unembedding" in parts and "log_scale" in (temperature := parts.pop("temperature", {})):
        weight_vd = parts["unembedding"]["weight"]
        parts["unembedding"]["weight"] = weight_vd * temperature["log_scale"].exp().to(weight_vd.dtype)
    norm = source.description.norm
    no_weights = norm is not None and next(model.get_submodule(norm).parameters(), None) is None
    is_own = set(parts) - {"norm", "translator", "unembedding"} or "unembedding" not in parts
    no_norm = norm is not None and "norm" not in parts
    norm_last = list(parts)[:2] == ["translator", "norm"]
    hindrances = [
        (no_weights, "may have a norm without weights or none, which its weights do not show"),
        ("blocks" in parts, "has blocks of its own (interlock.head.blocks), and so more than the stages"),
        ("down" in parts, "has an unembedding of low rank (interlock.head.type low_rank)"),
        (is_own, f"is the user's own: it has {', '.join(parts)}"),
        (no_norm, "has no norm before its unembedding (interlock.head.type linear)"),
        (norm_last, 'has its translator before the norm (interlock.head.translator "before_norm")'),
    ]
    for hinders, why in hindrances:
        if hinders:
            raise ConfigError(f"head {loss} {why}, so it is not of the model's architecture: {_FITTING}")
    return parts


def _fold(parts: _Parts, has_bias: bool, dtype: torch.dtype | None, name: str) -> _Parts:
    """Norm and unembedding that do what norm, translator and unembedding do, computed in float64.

    The translator's bias goes into the unembedding's if the architecture has one, else into the norm's.
    """
    weight_vd = parts["unembedding"]["weight"]
    map_dd = parts["translator"]["change.weight"].double()
    map_dd = map_dd + torch.eye(len(map_dd), dtype=torch.float64)
    change_d = parts["translator"].get("change.bias", map_dd.new_zeros(len(map_dd))).double()
    kind = dtype or weight_vd.dtype
    rows = torch.split(weight_vd, _ROWS_AT_ONCE)
    folded_vd = torch.cat([(row.double() @ map_dd).to(kind) for row in rows])
    unembedding = {**parts["unembedding"], "weight": folded_vd}
    norm = dict(parts.get("norm", {}))
    if has_bias:
        bias_v = torch.cat([row.double() @ change_d for row in rows])
        unembedding["bias"] = (unembedding.get("bias", torch.zeros_like(bias_v)).double() + bias_v).to(kind)
    elif "bias" in norm:
        try:
            norm["bias"] = (norm["bias"].double() + torch.linalg.solve(map_dd, change_d)).to(kind)
        except RuntimeError as error:
            raise ConfigError(f"{name}: its translator is singular: {_FITTING}") from error
    elif change_d.any():
        raise ConfigError(
            f"{name}: its translator has a bias, and neither norm nor unembedding of the model has one to "
            f"take it: {_FITTING}"
        )
    return {"norm": norm, "unembedding": unembedding}
