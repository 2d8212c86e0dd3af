"""A tiny configuration of every model that transformers can build, by shrinking its default one.

Sizes are known by their names, whatever the family. What a name does not show is in ``_BY_HAND``.
"""

import dataclasses
import re
from typing import Any

from families import NUM_BLOCKS, POSITIONS, VOCABULARY
from transformers import CONFIG_MAPPING, PreTrainedConfig

_TINY = {
    r"\w*num_kv_shared_layers|\w*first_k_dense_replace|\w*num_dense_layers|\w*nextn\w*|\w*mtp_num\w*": 1,
    r"\w*(num|n|encoder|decoder)_((hidden|decoder|encoder)_)?(layers?|blocks)|num_\w+_layers": NUM_BLOCKS,
    r"\w*(mamba|ssm)_(head_?dim|d_head)": 16,
    r"\w*rotary_\w*dim": 4,
    r"\w*((key_value|kv|query|mamba|ssm)_)?n?_?groups?|multi_query_group_num": 2,
    r"\w*n(um)?_\w*heads?|(encoder|decoder)_attention_heads": 4,
    r"\w*head_?dim|\w*head_size|d_kv|qk_\w*dim|v_\w*dim|kv_channels|dim_head": 8,
    r"\w*(intermediate|inner|ffn|ff|mlp)_\w*(size|dim)\w*|ffn_dim|dff|dim_ff|n_inner|hidden_dim": 48,
    r"\w*(hidden|model|embed\w*|embd|emb|lru)_?(dim|size|width)\w*|d_model|n_embd|dim|width": 32,
    r"\w*vocab(_size\w*)?": VOCABULARY,
    r"\w*max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length": POSITIONS,
    r"\w*(sliding|local_attention|attention_window|window_size|chunk_size)\w*": 5,
    r"\w*n(um)?_\w*experts|\w*expert_num": 4,
    r"\w*(experts_per_tok\w*|top_?k\w*|moe_k|num_selected_experts)": 2,
    r"\w*(lora|low|dt|adapter)_?rank": 8,
    r"\w*(state_size|d_state)": 8,
}
"""Tiny values by regular expressions for whole names; the first that matches counts."""

_NEEDED = r"head_dim|n_(routed|shared)_experts|num_experts_per_tok"  # some default configurations lack them

_BY_HAND: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_BLOCKS // 2]]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": None},
    "mamba2": {"head_dim": 16},
    "mimo_v2_flash": {"num_attention_heads": 8, "head_dim": 16},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 16,
        **dict.fromkeys(["swa_q_lora_rank", "swa_kv_lora_rank", "swa_v_head_dim"], 8),
        **dict.fromkeys(["swa_qk_nope_head_dim", "swa_qk_rope_head_dim"], 8),
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [3, 4]},
    "xmod": {"default_language": "en_XX"},
}


def tiny(model_type: str) -> Any:
    """The configuration of a tiny decoder of the family, as like its default one as can be; no dropout."""
    config_class: Any = CONFIG_MAPPING[model_type]
    return _tiny(config_class(), **_BY_HAND.get(model_type, {}))


def _tiny(default: Any, **changes: Any) -> Any:
    num_layers, num_heads = (_of(default, name) for name in ("num_hidden_layers", "num_attention_heads"))
    for name in (field.name for field in dataclasses.fields(default) if field.name not in changes):
        value = _of(default, name)
        smaller = _smaller(name, value, num_layers, num_heads)
        if smaller is not value:
            changes[name] = smaller
    return type(default)(**changes)


def _of(default: Any, name: str) -> Any:
    return vars(default).get(default.attribute_map.get(name, name))


def _smaller(name: str, value: Any, num_layers: Any, num_heads: Any) -> Any:
    if isinstance(value, PreTrainedConfig):
        return _tiny(value)
    if re.fullmatch(r"\w*(drop|jitter)\w*", name) and isinstance(value, float):
        return 0.0
    if re.fullmatch(r"\w*_token(_id|_index|_idx)\w*", name):
        return _token(name, value)
    if isinstance(value, list) and len(value) == num_layers:
        return _shortened([_smaller(name, each, None, num_heads) for each in value])
    if name == "is_encoder_decoder":
        return False
    if name == "is_decoder":
        return True
    if "key_value" in name and value in (None, num_heads):
        return None if num_heads is None else 4
    if (value is None and not re.fullmatch(_NEEDED, name)) or not isinstance(value, int | None):
        return value
    if isinstance(value, bool):
        return value
    size = next((size for names, size in _TINY.items() if re.fullmatch(names, name)), value)
    return size if value is None else min(value, size)


def _token(name: str, value: Any) -> Any:
    known = {"pad": 0, "bos": 1, "eos": 2}
    return value if value is None else known.get(name.partition("_")[0], 3)


def _shortened(by_layer: list[Any]) -> list[Any]:
    """One layer of each kind and the first ones, in their order."""
    first = [number for number, kind in enumerate(by_layer) if kind not in by_layer[:number]][:NUM_BLOCKS]
    others = [number for number in range(len(by_layer)) if number not in first]
    return [by_layer[number] for number in sorted(first + others[: NUM_BLOCKS - len(first)])]
