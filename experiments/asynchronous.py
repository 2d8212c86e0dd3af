"""Asynchronous pipelines in one process: which weights the gradients of a batch are taken at.

A stage of an asynchronous pipeline never waits for the others to finish a batch. It updates its weights
after each backward, while later batches are already under way with weights from before the update. This is
how PipeDream does it with 3 stages (F3 is the forward of batch 3; B3 its backward and then an update):

    stage 0   F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3      F3 after B0, B3 after B2: 2 updates in between
    stage 1   .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3         F3 after B1, B3 after B2: 1 update
    stage 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3            none

With weight stashing, the backward of a batch on a stage uses the weights of its forward there, however often
the stage has been updated since. So with w_k(t) the weights of stage k after t updates, batch t gives one
gradient, at weights of different ages, and every stage takes its part of it:

    PipeDream       w_k(t + 1) = w_k(t) - step(gradient_k of batch t at w_0(t - K + 1) ... w_K-1(t))
    PipeDream-2BW   w_k(t + 1) = w_k(t) - step(gradient_k of batch t at w_0(t - 1) ... w_K-1(t - 1))

Weights from before the first update are w_k(0). 2BW keeps two versions of the weights, which is enough if a
batch has at least K micro-batches: those in flight then belong to two batches. A batch of PipeDream is not
divided. Buffers, as batch norm's averages, are never stale.

Sources: Harlap et al.: PipeDream, 2018 (arXiv 1806.03377), section 3.4; Narayanan et al.: Memory-Efficient
Pipeline-Parallel DNN Training, 2021 (arXiv 2006.09503), section 3.1; NAdam for stale gradients: Ajanthan et
al.: Nesterov Method for Asynchronous Pipeline Parallel Optimization, 2025 (arXiv 2505.01099).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Method = Literal["pipedream", "2bw"]


def delays(method: Method | None, num_stages: int) -> list[int]:
    """How many updates old the weights are that each stage's gradient is taken at; None: not asynchronous."""
    if method == "pipedream":
        return list(reversed(range(num_stages)))
    return [1 if method == "2bw" else 0] * num_stages


class StaleWeights:
    """The last weights of every stage, for the gradients of an asynchronous pipeline.

    Args:
        stages: The parameters of each stage.
        ages: For each stage, how many updates old the weights of its gradients are.
    """

    def __init__(self, stages: Sequence[Sequence[nn.Parameter]], ages: Sequence[int]) -> None:
        self._stages = [(parameters, age) for parameters, age in zip(stages, ages, strict=True) if age]
        self._versions = [deque([_copies(of_stage)] * age, maxlen=age) for of_stage, age in self._stages]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """To take the gradients of one batch in: they stay, and so do the weights from before."""
        current = [_copies(parameters) for parameters, _ in self._stages]
        self._set([versions[0] for versions in self._versions])
        yield
        self._set(current)
        for versions, of_stage in zip(self._versions, current, strict=True):
            versions.append(of_stage)

    def state(self) -> list[list[list[Tensor]]]:
        """What the next gradients depend on: for each stage with stale weights its versions, oldest first."""
        return [list(versions) for versions in self._versions]

    def load(self, state: list[list[list[Tensor]]]) -> None:
        """Restores a ``state``."""
        for versions, of_stage in zip(self._versions, state, strict=True):
            versions.extend(of_stage)

    def _set(self, weights: Sequence[Sequence[Tensor]]) -> None:
        with torch.no_grad():
            for (parameters, _), of_stage in zip(self._stages, weights, strict=True):
                torch._foreach_copy_(list(parameters), list(of_stage))


def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
