"""A job under the deepspeed launcher of which one rank dies."""

import os
import signal

import torch
from deepspeed.pipe import LayerSpec
from torch import nn

import ds_interlock

WIDTH = 4


def main() -> None:
    torch.set_num_threads(1)
    ds_interlock.init_distributed(dist_backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "interlock": {"mode": "local", "timeout_seconds": 20},
    }
    net = ds_interlock.InterlockPipelineModule(
        layers=[LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(4)],
        loss_fn=nn.functional.cross_entropy,
        num_stages=2,
    )
    engine, *_ = ds_interlock.initialize(model=net, config=config)
    micro_batch = torch.randn(2, WIDTH), torch.full((2,), WIDTH - 1)
    # The launcher ends the ranks that are left as soon as it sees that one has died, which may be before this
    # one's first batch has ended. It first says what it misses, which it may not have time for otherwise.
    if os.environ["RANK"] == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    engine.train_batch(iter([micro_batch] * 6))
    if os.environ["RANK"] == "1":
        os._exit(3)
    engine.train_batch()
    engine.drain()


if __name__ == "__main__":
    main()
