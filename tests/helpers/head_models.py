"""Small models of every kind that heads are derived from, and a batch for them."""

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_interlock.config import HeadConfig
from ds_interlock.heads.factory import head_factory
from ds_interlock.schedule.plan import LossHead

WIDTH, VOCABULARY = 12, 31


class Block(nn.Module):
    """A residual block; carries a mask along if it is given one."""

    def __init__(self, width: int = WIDTH, eps: float = 1e-3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.grow = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)

    def forward(self, hidden: Any) -> Any:
        hidden_btd = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden_btd = hidden_btd + self.shrink(F.gelu(self.grow(self.norm(hidden_btd))))
        return (hidden_btd, *hidden[1:]) if isinstance(hidden, tuple) else hidden_btd


class ModelRMSNorm(nn.Module):
    """A model's own norm, with a scale that starts at 0 and is added to 1."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return F.rms_norm(hidden_btd, (hidden_btd.shape[-1],), 1 + self.weight, self.variance_epsilon)


class NormAndUnembedding(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-2)
        self.unembedding = nn.Linear(WIDTH, VOCABULARY, bias=bias)


class Embeddings(nn.Module):
    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Embedding(5, width)
        self.tokens = nn.Embedding(num_tokens, width)


def unembed(module: Embeddings, hidden_btd: Tensor) -> Tensor:
    return hidden_btd @ module.tokens.weight.T


def language_model(*, bias: bool = False) -> list[Any]:
    return [
        LayerSpec(nn.Embedding, VOCABULARY, WIDTH),
        LayerSpec(Block),
        LayerSpec(Block),
        LayerSpec(nn.LayerNorm, WIDTH, eps=1e-4),
        LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=bias),
    ]


def cross_entropy(logits_btv: Tensor, labels_bt: Tensor) -> Tensor:
    return F.cross_entropy(logits_btv.flatten(0, -2), labels_bt.flatten(), ignore_index=-100)


def build(layers: list[Any], after_layer: int = 2, **config: Any) -> nn.Module:
    torch.manual_seed(5)
    return head_factory(HeadConfig(**config), layers)(LossHead(stage=0, after_layer=after_layer))


def hidden_and_labels(num_ignored: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden_btd = torch.randn(3, 7, WIDTH, generator=generator)
    labels_bt = torch.randint(VOCABULARY, (3, 7), generator=generator)
    labels_bt.view(-1)[:num_ignored] = -100
    return hidden_btd, labels_bt
