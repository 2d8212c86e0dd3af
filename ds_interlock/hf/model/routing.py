"""The balancing loss of a mixture of experts, in a pipeline.

    front: zeros ──► block: + its share ──► block: + its share ──► ... ──► the final loss, as transformers'
                                                  │
                                                  └─► a head: the same, of the blocks before it

transformers adds up, over all routers, how often each expert was chosen and how probable it was, and
multiplies the two. So both sums, ``routing_b2e``, travel beside the hidden state: each loss adds the balance
of the routers before it, and its gradient goes back as far as the rest of that loss does.

Shape suffixes: b batch, t position, e experts, n = b times t.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_interlock.errors import ConfigError
from ds_interlock.heads.lm_loss import LMLoss
from ds_interlock.heads.output_layers import first_tensor

_FORMULA = "load_balancing_loss_func"  # its name in transformers' files


@dataclass(frozen=True)
class Routing:
    """The routers of a model, and what their balance counts."""

    routers: tuple[tuple[type[nn.Module], int], ...]  # classes, and where in their output the logits are
    num_experts: int
    top_k: int
    coefficient: float

    def begin(self, hidden_btd: Tensor) -> Tensor:
        """The sums before the first block, float32 ``[b, 2, e]``."""
        return torch.zeros(len(hidden_btd), 2, self.num_experts, device=hidden_btd.device)

    @contextmanager
    def watch(self, block: nn.Module) -> Iterator[list[Tensor]]:
        """Within it, the list that it yields gets the logits ``[n, e]`` of each router of ``block``."""
        logits: list[Tensor] = []

        def hook(index: int) -> Any:
            def note(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
                logits.append(outputs[index] if isinstance(outputs, tuple) else outputs)

            return note

        found = [(part, i) for part in block.modules() for kind, i in self.routers if isinstance(part, kind)]
        handles = [part.register_forward_hook(hook(index)) for part, index in found]
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()

    def share(self, logits_ne: Tensor, batch: int, mask_bt: Tensor | None) -> Tensor:
        """What one router adds to the sums; padding (0 in ``mask_bt``) does not count."""
        probabilities_ne: Tensor = logits_ne.softmax(-1)
        chosen_nk = probabilities_ne.topk(self.top_k, -1).indices
        counts_ne = nn.functional.one_hot(chosen_nk, self.num_experts).sum(1)
        both_n2e = torch.stack([counts_ne.float(), probabilities_ne.float()], 1)
        both_bt2e = both_n2e.reshape(batch, -1, 2, self.num_experts)
        if mask_bt is not None:
            both_bt2e = both_bt2e * mask_bt[..., None, None]
        return both_bt2e.sum(1)

    def balance(self, routing_b2e: Tensor) -> Tensor:
        """The loss of the sums, a scalar; 0 before the first router.

        Source: Fedus, Zoph, Shazeer: Switch Transformers, 2021, equations 4 to 6.
        """
        counts_e, probabilities_e = routing_b2e.sum(0)
        num_tokens = (counts_e.sum() / self.top_k).clamp(min=1)
        balance: Tensor = self.num_experts * (counts_e / num_tokens) @ (probabilities_e / num_tokens)
        return balance


class BalancedLMLoss(LMLoss):
    """The loss of a language model; in training with ``coefficient`` times the balance of its routers."""

    def __init__(self, routing: Routing, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.routing = routing

    def forward(self, outputs: Any, labels: Any) -> Tensor:
        return super().forward(first_tensor(outputs), labels)

    def beside(self, hidden: Any) -> Tensor:
        """What is added to a loss, from the hidden state that it reads and what travels beside it."""
        routing_b2e: Tensor = hidden[-1]
        if not self.training:
            return routing_b2e.new_zeros(())
        return self.routing.coefficient * self.routing.balance(routing_b2e)


def find_routing(model: Any) -> Routing | None:
    """The routers of a model whose configuration asks for their balance (``output_router_logits``).

    None without such, or if transformers does not add a balance to the loss of its class.

    Raises:
        ConfigError: If the balance is not the one that is known here.
    """
    own_formula = getattr(sys.modules[type(model).__module__], _FORMULA, None)
    in_its_loss = own_formula is not None and hasattr(model, "router_aux_loss_coef")
    if not in_its_loss or not getattr(model.config, "output_router_logits", False):
        return None
    recorders = (model.base_model._can_record_outputs or {}).get("router_logits")
    recorders = recorders if isinstance(recorders, list) else [recorders]
    routing = Routing(
        tuple((each.target_class, each.index) for each in recorders if hasattr(each, "target_class")),
        getattr(model, "num_experts", 0),
        getattr(model, "num_experts_per_tok", 0),
        model.router_aux_loss_coef,
    )
    if not _is_formula(own_formula, routing):
        raise ConfigError(
            f"--model: {type(model).__name__} balances its experts in a way of its own, which is not known "
            "here: leave out --output_router_logits, or set it to false in config.json"
        )
    return routing


def _is_formula(own_formula: Any, routing: Routing) -> bool:
    """Whether it gives what ``balance`` does, on an example."""
    generator = torch.Generator().manual_seed(0)
    if not routing.routers or not 0 < routing.top_k <= routing.num_experts:
        return False
    layers = [torch.randn(6, routing.num_experts, generator=generator) for _ in range(2)]
    mask_bt = torch.tensor([[1, 1, 1], [1, 1, 0]])
    own = sum((routing.share(layer_ne, 2, mask_bt) for layer_ne in layers), start=torch.zeros(()))
    try:
        theirs = own_formula(tuple(layers), routing.num_experts, routing.top_k, mask_bt)
    except (TypeError, RuntimeError):
        return False
    return torch.allclose(torch.as_tensor(theirs), routing.balance(own))
