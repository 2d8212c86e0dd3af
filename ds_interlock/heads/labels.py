"""The labels of a language model's micro-batch, alone or with what their loss is divided by.

    labels                        int64, one label for each position: the loss is the mean over those that
                                  are not ``IGNORED_LABEL``
    (labels, normaliser)          ... the sum over them, divided by ``normaliser``
    (labels, normaliser, base)    ... and ``base`` says what the frozen base model makes of each position:
                                  its last hidden states, or places in states that heads hold themselves

A batch is the mean of its micro-batches, and a mean of means gives more weight to the labels of a short one.
``normaliser`` corrects that: it is the number of labels in the whole batch, divided by the number of
micro-batches in it (and of replicas), and the same in all of them.

Shape suffixes: b micro-batch, t position, d width; 1 a single number.
"""

from typing import Any, NamedTuple

from torch import Tensor

IGNORED_LABEL = -100
"""A label that takes no part in the loss."""


class Labels(NamedTuple):
    """Labels in their parts."""

    labels: Tensor
    """int64 ``[b, t]``; ``[b]`` if whole sequences are classified."""
    normaliser: Tensor | None = None
    """float32 ``[1]``, above 0; None to divide by the number of labels that count."""
    base: Tensor | None = None
    """``[b, t, d]``, what the base model's unembedding turns into outputs; or int64 ``[b, t]``, which of the
    states of ``AuxiliaryHead.base_states`` is that of each position."""

    @classmethod
    def parse(cls, value: Any) -> "Labels | None":
        """Takes the three forms apart; None if ``value`` is something else."""
        parts = [value] if isinstance(value, Tensor) else value
        if not isinstance(parts, tuple | list) or not 1 <= len(parts) <= 3:
            return None
        if not all(isinstance(part, Tensor) for part in parts) or (len(parts) > 1 and parts[1].numel() != 1):
            return None
        return cls(*parts)

    @property
    def compact(self) -> Tensor | tuple[Tensor, ...]:
        """The labels in the shortest of the three forms."""
        parts = tuple(part for part in self if part is not None)
        return parts if len(parts) > 1 else self.labels

    def base_at(self, positions_n: Tensor) -> Tensor:
        """``base`` at some positions, counted through the micro-batch: ``[n, d]`` or ``[n]``."""
        assert self.base is not None
        return self.base.flatten(0, self.labels.dim() - 1).index_select(0, positions_n)

    @property
    def divisor(self) -> Tensor:
        """What the summed loss is divided by, a scalar."""
        if self.normaliser is not None:
            return self.normaliser.reshape(())
        return (self.labels != IGNORED_LABEL).sum().clamp(min=1)
