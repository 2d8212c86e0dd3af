"""A language model of ``models/lm.py`` as a plain Hugging Face GPT-2 checkpoint.

layer_00-model_states.pt ... ──read_layer_states──► {0: {"weight": ...}, 1: ...} ──export_gpt2──► a folder
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from ds_interlock.errors import ConfigError
from ds_interlock.hf.export.checkpoint import PipelineCheckpoint
from ds_interlock.hf.export.model_folder import new_folder
from ds_interlock.models.lm import LMConfig

LayerStates = Mapping[int, Mapping[str, Tensor]]

# Names of a block's parts: ours, GPT-2's.
_BLOCK_PARTS = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def export_gpt2(
    layer_states: LayerStates, config: LMConfig, output_dir: str | Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes a folder that ``AutoModelForCausalLM.from_pretrained`` loads, the tokenizer included.

    ``layer_states`` has the state dict of every layer by its number. The unembedding may be missing if the
    embeddings are tied; if it differs from the embedding, they are exported untied. ConfigError if the layers
    are not those of ``config``, or the folder cannot be written.
    """
    tensors = _gpt2_tensors(layer_states, config)
    tied = torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
    model = GPT2LMHeadModel(_gpt2_config(config, tied, tokenizer))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint's layers do not fit the model's configuration: {error}") from error
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with new_folder(output_dir, num_bytes) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def read_layer_states(checkpoint_dir: str | Path) -> dict[int, dict[str, Tensor]]:
    """State dict of every layer in a pipeline checkpoint; argument and errors as of ``PipelineCheckpoint``.

    A tied unembedding has no file. If it was trained apart, it comes as the layer after the last.
    """
    checkpoint = PipelineCheckpoint(checkpoint_dir)
    states = {number: dict(state) for number, state in checkpoint.layers.items()}
    if checkpoint.untied_copies:
        states[max(states) + 1] = dict(checkpoint.untied_copies)
    return states


def _gpt2_config(config: LMConfig, tied: bool, tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.seq_length,
        n_embd=config.width,
        n_layer=config.num_blocks,
        n_head=config.num_heads,
        activation_function="gelu_new",
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        tie_word_embeddings=tied,
        # The defaults are ids of OpenAI's vocabulary.
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _gpt2_tensors(layer_states: LayerStates, config: LMConfig) -> dict[str, Tensor]:
    """The state dict of ``GPT2LMHeadModel``, in float32."""
    tensors: dict[str, Tensor] = {}
    last = config.num_layers - 1
    needed = set(range(last if config.tie_embeddings else last + 1))
    if needed - set(layer_states) or max(layer_states) > last:
        raise ConfigError(
            f"the checkpoint has layers {sorted(layer_states)}: expected 0 to {last}, as the model's "
            f"configuration has num_blocks {config.num_blocks}"
        )
    for number in range(config.num_blocks):
        for name, tensor in layer_states[2 + number].items():
            part, _, kind = name.rpartition(".")
            # GPT-2's Conv1D keeps its matrices transposed.
            value = tensor.T if tensor.dim() == 2 else tensor
            tensors[f"transformer.h.{number}.{_BLOCK_PARTS.get(part, part)}.{kind}"] = value
    tensors["transformer.wte.weight"] = layer_states[0]["weight"]
    tensors["transformer.wpe.weight"] = layer_states[1]["weight"]
    tensors |= {f"transformer.ln_f.{name}": layer_states[last - 1][name] for name in ("weight", "bias")}
    tensors["lm_head.weight"] = layer_states.get(last, layer_states[0])["weight"]
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
