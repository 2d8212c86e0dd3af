"""Kernels that save memory: their backward passes write into what the forward saved."""

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 8


class ScalesWhatItSaved(torch.autograd.Function):
    """``x * x / 2``; autograd does not see that the backward pass changes what was saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone())
        return x * x / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        return saved.data.mul_(gradient)


class ReusesMemory(torch.autograd.Function):
    """A linear map whose input gradient takes the place of its input, so every later walk agrees on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone(), weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        saved, weight = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).T @ saved.flatten(0, -2)
        return saved.data.copy_(gradient @ weight), of_weight


class Frees(torch.autograd.Function):
    """Drops what it saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.clone()
        return x * x / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x = ctx.x
        del ctx.x
        return x * gradient


class KernelLayer(nn.Module):
    """A linear map with one of these behind it, batch norm, and what is usual in its place without."""

    def __init__(self, kernel: str = "") -> None:
        super().__init__()
        self.kernel = kernel
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x_bd: Tensor) -> Tensor:
        if self.kernel == ReusesMemory.__name__:
            return self.norm(ReusesMemory.apply(x_bd, self.linear.weight))
        x_bd = self.linear(x_bd)
        kernels = {kernel.__name__: kernel for kernel in (ScalesWhatItSaved, Frees)}
        return self.norm(kernels[self.kernel].apply(x_bd) if self.kernel else x_bd * x_bd / 2)


def layers_and_inputs() -> tuple[list[nn.Module], Tensor]:
    """Three layers, the second with a kernel that changes what it saved; for `ds-interlock verify`."""
    torch.manual_seed(0)
    kernels = "", ScalesWhatItSaved.__name__, ""
    return [KernelLayer(kernel) for kernel in kernels], torch.randn(4, WIDTH)


def usual_layers_and_inputs() -> tuple[list[nn.Module], Tensor]:
    """The same without the kernel."""
    layers, inputs = layers_and_inputs()
    return [layers[0], layers[2]], inputs
