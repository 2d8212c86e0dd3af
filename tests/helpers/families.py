"""Random tiny models of the families that are tested, and a tokenizer that fits them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

VOCABULARY = 131
POSITIONS = 64
NUM_BLOCKS = 4

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT2_SIZES = {"n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": POSITIONS}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "llama, tied": {**_GROUPED, "tie_word_embeddings": True},
    "mistral": {**_GROUPED, "sliding_window": 5},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "gpt2": _GPT2_SIZES,
    "gpt_neox": _SIZES,
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt, projected": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 2},
    "qwen3_moe": {
        **_GROUPED,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "gpt_oss": {
        **_GROUPED,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
    },
    "deepseek_v3": {
        **_SIZES,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
    },
    "cohere": _GROUPED,
    "bloom": {"hidden_size": 32, "n_layer": NUM_BLOCKS, "n_head": 4},
    "olmo": _GROUPED,  # a norm without weights at the end
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"] * 2},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": NUM_BLOCKS,
        "num_heads": 4,
        "window_size": 5,
        "attention_types": [[["global", "local"], NUM_BLOCKS // 2]],
        "max_position_embeddings": POSITIONS,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": NUM_BLOCKS, "max_seq_len": POSITIONS},
    "codegen": {**_GPT2_SIZES, "n_ctx": POSITIONS, "rotary_dim": 4},
}
"""Sizes by family. The name before a comma is transformers' ``model_type``."""

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": _SIZES,
    "distilbert": {"dim": 32, "n_layers": NUM_BLOCKS, "n_heads": 4, "hidden_dim": 48},
    "modernbert": {**_SIZES, "global_attn_every_n_layers": 2, "local_attention": 8},
}

_NO_DROPOUT = dict.fromkeys(
    [
        "attn_pdrop",
        "dropout",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "embd_pdrop",
        "hidden_dropout",
        "hidden_dropout_prob",
        "resid_pdrop",
        "seq_classif_dropout",
    ],
    0.0,
)


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model, without dropout."""
    name = family.partition(",")[0]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    sizes = {**tokens, **(DECODERS | ENCODERS)[family], **changes}
    config = CONFIG_MAPPING[name](vocab_size=VOCABULARY, **sizes)
    for key, value in _NO_DROPOUT.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return config


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model, its biases and norms included, so that nothing is zero or one by chance."""
    torch.manual_seed(seed)
    is_causal = family in DECODERS and "num_labels" not in changes
    auto = AutoModelForCausalLM if is_causal else AutoModelForSequenceClassification
    model = auto.from_config(tiny_config(family, **changes), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_tiny(family: str, folder: Path, seed: int = 0, shards: str = "5GB", **changes: Any) -> Any:
    """Writes a random model with a tokenizer to ``folder``; returns the model."""
    model = tiny_model(family, seed, **changes)
    model.save_pretrained(folder, max_shard_size=shards)
    tiny_tokenizer().save_pretrained(folder)
    return model


def save_gguf(file: Path) -> None:
    """Writes a random Llama of two blocks with ``tiny_tokenizer`` as a GGUF file of float32 tensors."""
    import gguf

    ids = tiny_tokenizer().get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    width, narrow, inside = 32, 16, 48
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(2)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inside)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), width), "output": (len(tokens), width)}
    shapes["output_norm"] = (width,)
    for block in range(2):
        shapes |= {f"blk.{block}.{part}_norm": (width,) for part in ("attn", "ffn")}
        shapes |= {f"blk.{block}.attn_{part}": (width, width) for part in ("q", "output")}
        shapes |= {f"blk.{block}.attn_{part}": (narrow, width) for part in ("k", "v")}
        shapes |= {f"blk.{block}.ffn_{part}": (inside, width) for part in ("gate", "up")}
        shapes[f"blk.{block}.ffn_down"] = (width, inside)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", 0.3 * random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes that a text in English has, as tokens of their own; 128 of them, and three special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
