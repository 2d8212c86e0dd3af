"""What an auxiliary head reads of a micro-batch: a random share of its sequences, or of its positions.

Both draw from the device's global generator, whose state is part of a checkpoint.

Shape suffixes: b batch, t position (any number of dimensions), d hidden width, n chosen ones.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ds_interlock.errors import ConfigError
from ds_interlock.heads.labels import IGNORED_LABEL, Labels
from ds_interlock.heads.output_layers import first_tensor


def sample_sequences(hidden: Any, labels: Any, fraction: float) -> tuple[Any, Any]:
    """A random share of the sequences, at least one, and their labels.

    With a normaliser, which shrinks as much, the loss is an unbiased estimate of that of all; a mean over
    labels is one if all sequences have as many. What travels beside the hidden state has a row for each
    sequence, or one for all.
    """
    num_sequences, parts = len(first_tensor(hidden)), Labels.parse(labels)
    if parts is None or len(parts.labels) != num_sequences:
        got = type(labels).__name__ if parts is None else list(parts.labels.shape)
        raise ConfigError(
            f"interlock.head.sequence_fraction: {fraction} needs labels with a row for each of the "
            f"{num_sequences} sequences, not {got}; set it to 1"
        )
    num_chosen = max(1, round(fraction * num_sequences))
    if num_chosen == num_sequences:
        return hidden, labels
    device = first_tensor(hidden).device
    chosen_n = torch.randperm(num_sequences, device=device)[:num_chosen]

    def rows(tensor: Tensor) -> Tensor:
        has_rows = tensor.dim() > 0 and len(tensor) == num_sequences
        return tensor.index_select(0, chosen_n.to(tensor.device)) if has_rows else tensor

    sampled = Labels(
        rows(parts.labels),
        None if parts.normaliser is None else parts.normaliser * (num_chosen / num_sequences),
        None if parts.base is None else rows(parts.base),
    )
    return _pytree.tree_map_only(Tensor, rows, hidden), sampled.compact


def sample_positions(hidden_btd: Tensor, labels: Any, fraction: float) -> tuple[Tensor, Any]:
    """A random share of the labelled positions, as one sequence ``[1, n, d]`` with its labels.

    A mean over the share is an unbiased estimate of the mean over all; so is a sum divided by a normaliser
    that shrinks as much.
    """
    parts = Labels.parse(labels)
    if parts is None or parts.labels.shape != hidden_btd.shape[:-1]:
        got = type(labels).__name__ if parts is None else list(parts.labels.shape)
        raise ConfigError(
            f"interlock.head.token_fraction: {fraction} needs one label for each position, a tensor "
            f"{list(hidden_btd.shape[:-1])} for states {list(hidden_btd.shape)}, not {got}; set it to 1"
        )
    labelled = labelled_positions(parts.labels)
    num_labelled = len(labelled)
    # Without any label the model's own loss is taken over nothing too: leave that to the loss function.
    num_chosen = min(num_labelled, max(1, round(fraction * num_labelled)))
    chosen = labelled[torch.randperm(num_labelled, device=labelled.device)[:num_chosen]]
    share = num_chosen / num_labelled if num_labelled else 1.0
    sampled = Labels(
        parts.labels.flatten()[chosen].unsqueeze(0),
        None if parts.normaliser is None else parts.normaliser * share,
        None if parts.base is None else parts.base_at(chosen).unsqueeze(0),
    )
    return at(chosen, hidden_btd).unsqueeze(0), sampled.compact


def at(positions_n: Tensor, hidden_btd: Tensor) -> Tensor:
    """The hidden states at some positions, counted through the micro-batch: ``[n, d]``."""
    return hidden_btd.flatten(0, -2).index_select(0, positions_n)


def labelled_positions(labels_bt: Tensor) -> Tensor:
    """The positions with a label that counts, counted through the micro-batch: ``[n]``."""
    return (labels_bt.flatten() != IGNORED_LABEL).nonzero().squeeze(1)
