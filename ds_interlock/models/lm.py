"""A small decoder-only Transformer language model, as a list of layers for ``PipelineModule``.

The shape is GPT-2's, so that a trained model exports to a plain Hugging Face checkpoint. Each line is one
layer, hence one place where the pipeline can be cut:

    layer 0          TokenEmbedding      ids_bt     -> hidden_btd
    layer 1          PositionEmbedding   hidden_btd -> hidden_btd
    layers 2..       Block               x + attention(norm(x)), then x + mlp(norm(x))
    last but one     LayerNorm           hidden_btd -> hidden_btd
    last             Unembedding         hidden_btd -> logits_btv

Tokens and positions are two layers because tied weights share the first one alone.

Shape suffixes: b micro-batch, t position, d width, v vocabulary, h head, k width of a head.

Source: Radford, Wu, Child, Luan, Amodei, Sutskever: Language Models are Unsupervised Multitask
Learners, 2019, section 2.3 (pre-LayerNorm, the scaled initialisation of residual projections).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from ds_interlock.errors import ConfigError, list_faults
from ds_interlock.heads.lm_loss import LMLoss, lm_loss

__all__ = ["LMConfig", "LMLoss", "build_lm", "lm_layers", "lm_loss"]

GPT2_INIT_STD = 0.02  # at a width of 768
_MAX_LAYERS = 2**16  # keeps the seeds of two runs apart: no layer of one starts as a layer of the other
_TIED_KEY = "token_embedding"


@dataclass(frozen=True)
class LMConfig:
    """Sizes and options of the language model.

    Attributes:
        vocab_size: Number of token ids.
        seq_length: Positions the model knows; inputs may be shorter.
        width: Size of the hidden state; a multiple of ``num_heads``.
        num_blocks: Number of Transformer blocks.
        num_heads: Attention heads of a block.
        dropout: Probability, on the embedding, the attention weights and both residual branches.
        label_smoothing: Share of the target that is divided evenly among the vocabulary in training.
        tie_embeddings: Use the token embedding as unembedding (``TiedLayerSpec``).
        init_std: Standard deviation of the initial matrices; larger is better for narrow models.
        seed: A layer draws its initial weights from this and its number, so that they are the same however
            the layers are cut into stages.

    Raises:
        ConfigError: Listing every value that is impossible.
    """

    vocab_size: int
    seq_length: int
    width: int
    num_blocks: int
    num_heads: int
    dropout: float = 0.0
    label_smoothing: float = 0.0
    tie_embeddings: bool = False
    init_std: float = GPT2_INIT_STD
    seed: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}: expected at least 1"
            for name in ("vocab_size", "seq_length", "width", "num_blocks", "num_heads")
            if getattr(self, name) < 1
        ]
        faults += [
            f"{name} is {getattr(self, name)}: expected a share, 0 <= {name} < 1"
            for name in ("dropout", "label_smoothing")
            if not 0 <= getattr(self, name) < 1
        ]
        if not self.init_std > 0:
            faults.append(f"init_std is {self.init_std}: expected a positive number")
        if self.num_heads >= 1 and self.width % self.num_heads:
            faults.append(f"width is {self.width}: expected a multiple of num_heads, {self.num_heads}")
        if faults:
            raise ConfigError(list_faults("language model", faults))

    @property
    def num_layers(self) -> int:
        """Number of layers of ``lm_layers``: the blocks, two embeddings, norm, unembedding."""
        return self.num_blocks + 4


def lm_layers(config: LMConfig) -> list[LayerSpec]:
    """The model as layer specifications; see the picture at the top of the file."""
    seeds = [config.seed * _MAX_LAYERS + layer for layer in range(config.num_layers)]
    tokens = (config.vocab_size, config.width, seeds[0], config.init_std)
    tied = partial(TiedLayerSpec, _TIED_KEY, TokenEmbedding, *tokens, tied_weight_attr="weight")
    weights = {"seed": seeds[-1], "init_std": config.init_std}
    unembedding = LayerSpec(Unembedding, config.width, config.vocab_size, **weights)
    return [
        tied() if config.tie_embeddings else LayerSpec(TokenEmbedding, *tokens),
        LayerSpec(PositionEmbedding, config, seeds[1]),
        *(LayerSpec(Block, config, seed) for seed in seeds[2:-2]),
        LayerSpec(nn.LayerNorm, config.width),
        tied(forward_fn=unembed) if config.tie_embeddings else unembedding,
    ]


def build_lm(config: LMConfig) -> nn.Sequential:
    """The whole model in one process, with the weights that the pipeline starts from.

    Parameter names are those of ``PipelineModule``: ``3.attention.qkv.weight``.
    """
    layers: list[nn.Module] = [spec.build() for spec in lm_layers(config)]
    if config.tie_embeddings:
        layers[-1] = Unembedding(config.width, config.vocab_size)
        layers[-1].weight = cast(nn.Embedding, layers[0]).weight
    return nn.Sequential(*layers)


class TokenEmbedding(nn.Embedding):
    """ids_bt (int64) -> hidden_btd."""

    def __init__(self, vocab_size: int, width: int, seed: int, init_std: float) -> None:
        super().__init__(vocab_size, width)
        _initialise(self, seed, init_std)


class PositionEmbedding(nn.Module):
    """Adds a learned vector to every position: hidden_btd -> hidden_btd."""

    def __init__(self, config: LMConfig, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.seq_length, config.width))
        self.dropout = nn.Dropout(config.dropout)
        _initialise(self, seed, config.init_std)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(hidden_btd + self.weight[: hidden_btd.shape[1]]))


class Block(nn.Module):
    """One pre-LayerNorm Transformer block: hidden_btd -> hidden_btd."""

    def __init__(self, config: LMConfig, seed: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config)
        self.norm_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        _initialise(self, seed, config.init_std)
        # Every block adds twice to the residual stream; scaled so, its variance does not grow with depth.
        for projection in (self.attention.out, self.mlp.down):
            projection.weight.data /= math.sqrt(2 * config.num_blocks)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        hidden_btd = hidden_btd + self.attention(self.norm_1(hidden_btd))
        return cast(Tensor, hidden_btd + self.mlp(self.norm_2(hidden_btd)))


class CausalSelfAttention(nn.Module):
    """Multi-head attention to a position itself and those before it."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        heads_bt3hk = self.qkv(hidden_btd).unflatten(-1, (3, self.num_heads, -1))
        query_bhtk, key_bhtk, value_bhtk = heads_bt3hk.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout.p if self.training else 0.0
        mixed_bhtk = F.scaled_dot_product_attention(
            query_bhtk, key_bhtk, value_bhtk, is_causal=True, dropout_p=dropout
        )
        mixed_btd = mixed_bhtk.transpose(1, 2).flatten(2)
        return cast(Tensor, self.dropout(self.out(mixed_btd)))


class MLP(nn.Module):
    """Two linear layers around GPT-2's GELU ("gelu_new"), four times as wide inside."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(self.down(F.gelu(self.up(hidden_btd), approximate="tanh"))))


class Unembedding(nn.Linear):
    """hidden_btd -> logits_btv."""

    def __init__(
        self, width: int, vocab_size: int, *, seed: int = 0, init_std: float = GPT2_INIT_STD
    ) -> None:
        super().__init__(width, vocab_size, bias=False)
        _initialise(self, seed, init_std)


def unembed(embedding: nn.Module, hidden_btd: Tensor) -> Tensor:
    """logits_btv by a tied token embedding; the ``forward_fn`` of the last ``TiedLayerSpec``."""
    return F.linear(hidden_btd, cast(nn.Embedding, embedding).weight)


def _initialise(module: nn.Module, seed: int, std: float) -> None:
    """GPT-2's initial weights: matrices normal, biases 0; LayerNorm keeps PyTorch's ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.is_meta:  # built for a look at its shape only
            continue
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
