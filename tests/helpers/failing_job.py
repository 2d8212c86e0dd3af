"""A job under the deepspeed launcher in which one thing goes wrong; its argument says what."""

import os
import sys

import torch
from deepspeed.pipe import LayerSpec
from torch import nn

import ds_interlock

WIDTH = 4


class Misfit(nn.Module):
    """A head whose output has a class too few for the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH - 1)

    def forward(self, x):
        return self.linear(x)


def main(fault: str) -> None:
    torch.set_num_threads(1)
    ds_interlock.init_distributed(dist_backend="gloo")
    rank = int(os.environ["RANK"])
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "interlock": {"mode": "local", "timeout_seconds": 20},
    }
    if fault == "config" and rank == 1:
        config["interlock"]["combine"] = "farthest"
    net = ds_interlock.InterlockPipelineModule(
        layers=[LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(4)],
        loss_fn=nn.functional.cross_entropy,
        num_stages=2,
        head=(lambda place: Misfit()) if fault == "head" else None,
    )
    engine, *_ = ds_interlock.initialize(model=net, config=config)
    num_micro_batches = 4 if fault == "data" else 6
    micro_batch = torch.randn(2, WIDTH), torch.full((2,), WIDTH - 1)
    engine.train_batch(iter([micro_batch] * num_micro_batches))
    if fault == "death" and rank == 1:
        os._exit(3)
    engine.train_batch()
    engine.drain()


if __name__ == "__main__":
    main(sys.argv[-1])
