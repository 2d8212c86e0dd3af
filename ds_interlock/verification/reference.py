"""A small random model, its data, and the gradients a plan should give it, by plain autograd.

``truncated_gradients`` is the definition of a plan's gradients written down directly. It shares no
code with the pipeline: no schedule, no relays, no accumulation over micro-batches.

Shape suffixes: s sample, d hidden width, c class.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ds_interlock.sampling import seeded
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.in_process import InProcessPipeline

WIDTH = 16
NUM_CLASSES = 7
NUM_SAMPLES = 16
"""Samples in a batch; a multiple of every number of micro-batches it is cut into."""

_NOISE = 0.1

Batch = tuple[Tensor, Tensor]
"""Inputs ``[s, d]`` and labels ``[s]``."""

loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy


class Block(nn.Module):
    """A residual block that begins with a norm, as in the models this project is for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_sd: Tensor) -> Tensor:
        return hidden_sd + torch.tanh(self.linear(self.norm(hidden_sd)))


def small_model(num_layers: int, seed: int) -> list[nn.Module]:
    """Blocks, then a norm and an unembedding, which every type of head can be derived from.

    Weights are float32 and all random: at the usual ones and zeros of norms and biases some mistakes
    would not show.
    """
    with seeded(seed):
        end = [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, NUM_CLASSES)][-num_layers:]
        layers = [*(Block() for _ in range(num_layers - len(end))), *end]
        for layer in layers:
            for parameter in layer.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=_NOISE)
    return layers


def random_batches(num_batches: int, seed: int) -> list[Batch]:
    """Batches of float32 inputs and labels, the same for the same ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        inputs_sd = torch.randn(NUM_SAMPLES, WIDTH, generator=generator)
        batches.append((inputs_sd, torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator)))
    return batches


def micro_batches(batch: Batch, num_micro_batches: int) -> list[Batch]:
    """The samples of ``batch`` in order, in micro-batches of one size."""
    inputs_sd, labels_s = batch
    return list(zip(inputs_sd.chunk(num_micro_batches), labels_s.chunk(num_micro_batches), strict=True))


def truncated_gradients(net: InProcessPipeline, batch: Batch) -> dict[str, Tensor]:
    """The gradient of every parameter of ``net``, by name, by autograd on truncated graphs.

    What goes into a stage is a constant, and so are the weights of all other stages. A head's input is a
    constant for the head's own parameters. Only the layers, heads and plan of ``net`` are used.
    """
    plan = net.plan
    inputs_sd, labels_s = batch
    entering = [inputs_sd]  # by the number of layers before it
    with torch.no_grad():
        for layer in net.layers_in_order:
            entering.append(layer(entering[-1]))

    def loss_after(hidden_sd: Tensor, start: int, loss: int) -> Tensor:
        for layer in net.layers_in_order[start : plan.heads[loss].after_layer]:
            hidden_sd = layer(hidden_sd)
        outputs_sc = hidden_sd if loss == plan.final else net.heads[str(loss)](hidden_sd)
        return plan.heads[loss].weight * loss_fn(outputs_sc, labels_s)

    gradients: dict[str, Tensor] = {}
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    for stage in range(plan.num_stages):
        first = plan.stage_bounds[stage]
        losses = [loss_after(entering[first], first, loss) for loss in sorted(plan.trained_by[stage])]
        own = [name for name in names if not name.startswith("heads.") and stage_of(plan, name) == stage]
        gradients |= _gradients(net, own, torch.stack(losses).sum())
    for loss, head in enumerate(plan.heads[:-1]):
        own = [name for name in names if name.startswith(f"heads.{loss}.")]
        gradients |= _gradients(net, own, loss_after(entering[head.after_layer], head.after_layer, loss))
    return gradients


def stage_of(plan: GradientFlowPlan, name: str) -> int:
    """The stage that has the parameter called ``name``."""
    first, second, *_ = name.split(".")
    if first == "heads":
        return plan.heads[int(second)].stage
    return bisect_right(plan.stage_bounds, int(first)) - 1


def _gradients(net: InProcessPipeline, names: Sequence[str], value: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(value, [net.get_parameter(name) for name in names])
    return dict(zip(names, gradients, strict=True))
