"""The tasks: a model's layers, its batches and its evaluation, for each kind of model.

A batch is fixed by seed and step, so that a run can be resumed at any step and all modes of a seed see the
same batches in the same order.

Shape suffixes: b micro-batch, t position, d width.
"""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from ds_interlock import InterlockConfig
from ds_interlock.heads.factory import HeadFactory, head_factory
from ds_interlock.images.batches import ImageIterator, evaluation_batches
from ds_interlock.images.data import Normalisation, Score
from ds_interlock.images.sources import load_fashion_mnist
from ds_interlock.models.lm import CausalSelfAttention, LMConfig, lm_layers, lm_loss
from ds_interlock.models.resnet import ResNetConfig, classification_loss, resnet_heads, resnet_layers
from ds_interlock.stage.in_process import MicroBatch
from experiments.definition import ImageModel, ProseModel, Run
from experiments.prose import VOCAB_SIZE, load_prose

_VALIDATION_SEED = 2**40
"""Which windows of the validation text are scored: the same for all runs."""


class ResidualBranch(nn.Module):
    """Half of a Transformer block, attention or MLP: hidden_btd -> hidden_btd."""

    def __init__(self, norm: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = norm, branch

    def forward(self, hidden_btd: Tensor) -> Tensor:
        branch_btd: Tensor = self.branch(self.norm(hidden_btd))
        return hidden_btd + branch_btd


class Prose:
    """Characters or words of prose; heads are as the section says, by default norm and unembedding.

    ``layers`` have the seed's weights; they are cut at ``stage_bounds``.
    """

    def __init__(self, run: Run, model: ProseModel) -> None:
        self.run, self.seq_length = run, model.seq_length
        self.train, self.validation = prose(model.vocab_size)
        sizes = model.model_dump(exclude={"kind", "border_norm", "vocab_size", "embedding_std"})
        config = LMConfig(vocab_size=model.vocab_size or VOCAB_SIZE, seed=run.seed, **sizes)
        self.layers, self.stage_bounds = _cut_into_halves(config, run.num_stages, model.border_norm)
        if model.embedding_std:
            with torch.no_grad():
                next(self.layers[0].parameters()).mul_(model.embedding_std / model.init_std)
        self.loss_fn = lm_loss()

    def heads(self, section: InterlockConfig) -> HeadFactory:
        """What builds auxiliary heads."""
        return head_factory(section.head, self.layers, block=self._block)

    def _block(self, after_layer: int) -> range:
        """Attention and MLP of the block that ends, or has its middle, after so many layers."""
        branches = [layer.branch if isinstance(layer, ResidualBranch) else None for layer in self.layers]
        first = max(n for n in range(after_layer) if isinstance(branches[n], CausalSelfAttention))
        return range(first, first + 2)

    def batch(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, on the CPU."""
        training = self.run.training
        sizes = (training.num_micro_batches, training.micro_batch_size)
        windows = self._windows(self.train, sizes, self.run.seed * 2**32 + step)
        return [(window_bt[:, :-1], window_bt[:, 1:]) for window_bt in windows]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, num_samples: int, batch_size: int, device: str) -> dict[str, float]:
        """Validation loss of ``model`` (``loss``, nats)."""
        windows = self._windows(self.validation, (num_samples,), _VALIDATION_SEED).to(device)
        total = 0.0
        for window_bt in windows.split(batch_size):
            loss = self.loss_fn(model(window_bt[:, :-1]), window_bt[:, 1:])
            total += loss.item() * len(window_bt)
        return {"loss": total / num_samples}

    def probe(self) -> Tensor:
        """Some validation inputs, to look at hidden states with."""
        return self._windows(self.validation, (32,), _VALIDATION_SEED)[:, :-1]

    def _windows(self, text: Tensor, sizes: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - self.seq_length, sizes, generator=generator)
        return text[starts[..., None] + torch.arange(self.seq_length + 1)].long()


class Pictures:
    """Fashion-MNIST, with crops and flips; the methods are those of ``Prose``."""

    def __init__(self, run: Run, model: ImageModel) -> None:
        self.run, self.model, data = run, model, pictures()
        num_others = len(data.train) - model.num_validation_images
        self.test = data.train.after(num_others) if model.num_validation_images else data.test
        train = data.train.first(min(model.num_train_images or num_others, num_others))
        self.normalisation = Normalisation.of(train)
        self.iterator = ImageIterator(
            train, self.normalisation, run.training.micro_batch_size, seed=run.seed, augment=True
        )
        self.config = ResNetConfig(
            model.depth, data.num_classes, in_channels=data.in_channels, width=model.width, seed=run.seed
        )
        self.layers = [spec.build() for spec in resnet_layers(self.config)]
        first_blocks = _first_blocks(self.config.num_blocks, run.num_stages)
        self.stage_bounds = [0, *(1 + block for block in first_blocks[1:-1]), len(self.layers)]
        self.loss_fn = classification_loss

    def heads(self, section: InterlockConfig) -> HeadFactory:
        return resnet_heads(self.config, self.model.head_channels, self.model.head_size)

    def batch(self, step: int) -> list[MicroBatch]:
        num_micro_batches = self.run.training.num_micro_batches
        self.iterator.position = step * num_micro_batches
        return [next(self.iterator) for _ in range(num_micro_batches)]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, num_samples: int, batch_size: int, device: str) -> dict[str, float]:
        """Validation ``loss`` of ``model`` (nats) and ``error`` (share)."""
        images = self.test.first(num_samples)
        batches = evaluation_batches(images, self.normalisation, batch_size)
        scores = (Score.of(model(pixels.to(device)), labels.to(device)) for pixels, labels in batches)
        score = sum(scores, Score())
        return {"loss": score.loss, "error": score.error}

    def probe(self) -> Tensor:
        return self.normalisation(self.test.pixels_nchw[:64])


Task = Prose | Pictures


def make_task(run: Run) -> Task:
    """The task of a run; DataError if its data is missing, ConfigError if its model is impossible."""
    return Prose(run, run.model) if isinstance(run.model, ProseModel) else Pictures(run, run.model)


# Data is read once in a process.
prose = cache(load_prose)
pictures = cache(load_fashion_mnist)


def _first_blocks(num_blocks: int, num_stages: int) -> list[int]:
    """The first block of every stage, and the number of all: if they do not divide, the last have more."""
    return [num_blocks * stage // num_stages for stage in range(num_stages + 1)]


def _cut_into_halves(
    config: LMConfig, num_stages: int, border_norm: bool
) -> tuple[list[nn.Module], list[int]]:
    """The language model with two layers a block, and where it is cut: as many blocks in each stage."""
    tokens, positions, *blocks, norm, unembedding = (spec.build() for spec in lm_layers(config))
    layers: list[nn.Module] = [tokens, positions]
    bounds = [0]
    for start, stop in pairwise(_first_blocks(config.num_blocks, num_stages)):
        for block in blocks[start:stop]:
            layers.append(ResidualBranch(block.norm_1, block.attention))
            layers.append(ResidualBranch(block.norm_2, block.mlp))
        if border_norm and stop < config.num_blocks:
            layers.append(nn.LayerNorm(config.width))
        bounds.append(len(layers))
    bounds[-1] += 2
    return [*layers, norm, unembedding], bounds
