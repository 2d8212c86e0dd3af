"""The loss of a language model or a sequence classifier: cross-entropy over the labels that count.

Shape suffixes: b micro-batch, t position, d width, v vocabulary.
"""

from typing import Any

from torch import Tensor, nn

from ds_interlock.errors import ConfigError
from ds_interlock.heads.cross_entropy import cross_entropy_sum, linear_cross_entropy
from ds_interlock.heads.labels import Labels


class LMLoss(nn.Module):
    """Mean cross-entropy over the labels of a micro-batch that are not ``IGNORED_LABEL``; 0 if all are.

    Labels come in the three forms of ``ds_interlock.heads.labels``, and are not shifted here:
    ``labels_bt[:, t]`` is the token after position t. Outputs ``[b, c]`` with labels ``[b]``, one class for
    each sequence, are accepted too. ``PipelineModule`` keeps the loss as a submodule, so it follows
    ``train()`` and ``eval()``: labels are smoothed in training only.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits_btv: Tensor, labels: Tensor | tuple[Tensor, ...]) -> Tensor:
        parts = _parsed(labels)
        total = cross_entropy_sum(logits_btv.flatten(0, -2), parts.labels.flatten(), self._smoothing)
        return total / parts.divisor

    def fused_linear(
        self,
        hidden_btd: Tensor,
        weight_vd: Tensor,
        bias_v: Tensor | None,
        labels: Tensor | tuple[Tensor, ...],
    ) -> Tensor:
        """``self(F.linear(hidden_btd, weight_vd, bias_v), labels)`` without all logits at once."""
        parts = _parsed(labels)
        total = linear_cross_entropy(
            hidden_btd.flatten(0, -2), weight_vd, bias_v, parts.labels.flatten(), self._smoothing
        )
        return total / parts.divisor

    @property
    def _smoothing(self) -> float:
        return self.label_smoothing if self.training else 0.0


def _parsed(labels: Any) -> Labels:
    parts = Labels.parse(labels)
    if parts is None:
        got = labels if isinstance(labels, tuple | list) else [labels]
        described = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in got]
        raise ConfigError(
            "the language model's loss takes labels as a tensor, or as a tuple (labels, normaliser) or "
            f"(labels, normaliser, base) of tensors, the normaliser a single number; got {described}"
        )
    return parts


lm_loss = LMLoss
"""The loss function for ``PipelineModule(loss_fn=lm_loss())``."""
