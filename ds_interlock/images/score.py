"""How well images are classified: errors, counted one by one, and the mean cross-entropy.

Shape suffixes: b micro-batch, v class.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.images.batches import MicroBatch


@dataclass(frozen=True)
class Score:
    """Of some images; scores of other images are added to it.

    Attributes:
        num_images: Images that count: those whose label is not ``IGNORED_LABEL``.
        num_errors: How many of them the largest output is not at the label of.
        loss_sum: Sum of their cross-entropy, in nats.
    """

    num_images: int = 0
    num_errors: int = 0
    loss_sum: float = 0.0

    @classmethod
    def of(cls, logits_bv: Tensor, labels_b: Tensor) -> Self:
        """The score of the outputs for some images."""
        counted_b = labels_b != IGNORED_LABEL
        logits_bv, labels_b = logits_bv[counted_b].double(), labels_b[counted_b]
        return cls(
            len(labels_b),
            int((logits_bv.argmax(-1) != labels_b).sum()),
            F.cross_entropy(logits_bv, labels_b, reduction="sum").item(),
        )

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.num_images + other.num_images,
            self.num_errors + other.num_errors,
            self.loss_sum + other.loss_sum,
        )

    @property
    def error(self) -> float:
        """Share of the images that are classified wrongly."""
        return self.num_errors / self.num_images

    @property
    def loss(self) -> float:
        """Mean cross-entropy of an image, in nats."""
        return self.loss_sum / self.num_images


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[MicroBatch]) -> Score:
    """The score of a model in one process, in evaluation mode; it is then left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        return sum((Score.of(model(images), labels) for images, labels in batches), Score())
    finally:
        model.train(was_training)
