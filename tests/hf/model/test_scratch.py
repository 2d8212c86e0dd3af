"""A model of transformers from scratch: its configuration, and transformers' own initial weights."""

import re
from pathlib import Path

import pytest
import torch
from families import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_interlock.errors import ConfigError
from ds_interlock.hf.model.pretrained import Pretrained
from ds_interlock.hf.model.scratch import configuration, draw_weights

TINY = "hidden_size=32,intermediate_size=48,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=2"


def draw(name: str, overrides: str | None) -> Pretrained:
    config = configuration(name, overrides, tiny_tokenizer())
    return draw_weights(name, config, tiny_tokenizer(), 7, torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_initial_weights_are_transformers_own(family: str) -> None:
    sizes = "n_embd=32,n_layer=3,n_head=4" if family == "gpt2" else TINY
    drawn = draw(family, sizes)
    torch.manual_seed(7)
    whole = AutoModelForCausalLM.from_config(drawn.config).state_dict()
    layers = [spec.build() for spec in drawn.blueprint(tie=False).layers()]
    parts = {name: tensor for layer in layers for name, tensor in layer.state_dict().items()}
    # Without a tie the last stage has a copy of the embedding, under the embedding's name.
    assert whole.keys() - parts.keys() <= {"lm_head.weight"}
    assert all(torch.equal(parts[name], whole[name]) for name in parts)


def test_a_configuration_from_a_file(tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    LlamaConfig(hidden_size=64, rms_norm_eps=0.5, **quantised).save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        config = configuration(str(name), "tie_word_embeddings=true,vocab_size=200", tiny_tokenizer())
        assert (config.hidden_size, config.rms_norm_eps, config.vocab_size) == (64, 0.5, 200)
        assert config.tie_word_embeddings
        assert not hasattr(config, "quantization_config")  # that the new weights are not
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "overrides", "why"),
    [
        ("llama", "hidden_sizes=3", "'hidden_sizes=3' names no value of a LlamaConfig"),
        ("llama", "hidden_size", "'hidden_size' names no value"),
        ("llama", "hidden_size=wide", "hidden_size is of type int, and 'wide' is not"),
        ("llama", "tie_word_embeddings=maybe", "tie_word_embeddings is of type bool, and 'maybe' is not"),
        ("llama", "vocab_size=9", "vocab_size is 9, but the tokenizer has 131 ids"),
        ("llama", "hidden_size=33", "values do not fit each other (The hidden size (33) is not a multiple"),
        ("t5", "d_model=8", "encoder-decoder"),
        ("./nowhere", None, "--config_name ./nowhere: no Hugging Face configuration"),
    ],
)
def test_what_cannot_be_trained_from_scratch(name: str, overrides: str | None, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        draw(name, overrides)
