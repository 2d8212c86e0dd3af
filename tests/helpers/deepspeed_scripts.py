"""DeepSpeed pipeline scripts of the kinds that people write, with data that they make.

Each runs on a rank, under DeepSpeed or under this package: only what ``Kit`` gives differs. A script returns
its losses, and the parameters of its stage by name, without those of heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES: dict[str, dict[str, Any] | None] = {
    "DeepSpeed": None,
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    "window 2": {"mode": "interlock", "window": 2},
}
NUM_STAGES = 4
Outcome = tuple[list[float], dict[str, Tensor]]


@dataclass(frozen=True)
class Kit:
    """The lines that change when a script is switched from DeepSpeed to this package."""

    mode: str

    @property
    def ours(self) -> bool:
        return MODES[self.mode] is not None

    def initialize(self, **arguments: Any) -> Any:
        import deepspeed

        import ds_interlock

        return (ds_interlock if self.ours else deepspeed).initialize(**arguments)

    def pipeline(self, *positional: Any, head: Any = None, **arguments: Any) -> Any:
        """``head`` is for models whose output layers are not those of a language model."""
        from deepspeed.pipe import PipelineModule

        from ds_interlock import InterlockPipelineModule

        if self.ours:
            return InterlockPipelineModule(*positional, **arguments, head=head)
        return PipelineModule(*positional, **arguments)

    def config(self, **keys: Any) -> dict[str, Any]:
        section = MODES[self.mode]
        config = {"train_micro_batch_size_per_gpu": 2, "steps_per_print": None, **keys}
        return config | (
            {"interlock": {"timeout_seconds": 60, "streaming": False, **section}} if section else {}
        )


def _outcome(engine: Any, losses: list[float]) -> Outcome:
    state = engine.module.state_dict()
    kept = {name: value.detach().clone() for name, value in state.items() if not name.startswith("heads.")}
    engine.destroy()
    return losses, kept


# A convolutional network, as in DeepSpeed's tutorial.


def convolutional_layers() -> list[Any]:
    """Works in place wherever AlexNet does; cut ``uniform``, stages 1 and 3 begin so."""
    return [
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(2), lambda x: torch.flatten(x, 1), nn.Dropout(0.3)),
        *(nn.Linear(64, 32), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(32, 5)),
    ]


class ImageHead(nn.Module):
    """Begins in place, and takes whatever comes: images or features."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.pool, self.linear = nn.ReLU(inplace=True), nn.AdaptiveAvgPool1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(self.relu(x).flatten(1)[:, None])[:, 0])


def convolutional_network(kit: Kit, partition_method: str) -> Outcome:
    """A repeated loader, ``model_parameters``, dropout, in-place activations, pooling."""
    from deepspeed.utils import RepeatingLoader

    torch.manual_seed(0)
    net = kit.pipeline(
        convolutional_layers(),
        NUM_STAGES,
        loss_fn=nn.CrossEntropyLoss(),
        partition_method=partition_method,
        head=lambda _: ImageHead(),
    )
    images = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(images, (images.mean((1, 2, 3)) * 40).long().clamp(0, 4))
    engine, _, _, _ = kit.initialize(
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        config=kit.config(
            gradient_accumulation_steps=4,
            optimizer={"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        ),
    )
    torch.manual_seed(2)
    data_iter = iter(RepeatingLoader(torch.utils.data.DataLoader(data, batch_size=2)))
    losses = [float(engine.train_batch(data_iter=data_iter)) for _ in range(4)]
    return _outcome(engine, losses)


# A Llama in hand-written layers.

WIDTH, NUM_HEADS, VOCABULARY, LENGTH = 16, 2, 23, 6
Stream = tuple[Tensor, Tensor, Tensor]


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, batch: Stream) -> Stream:
        """Ids, mask, positions -> hidden state, mask, positions."""
        ids_bt, mask_bt, positions_bt = batch
        return self.tokens(ids_bt), mask_bt, positions_bt


class Decoder(nn.Module):
    """Attention with rotary positions, and an MLP. It changes its positions in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.output = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.down = (
            nn.Linear(WIDTH, 4 * WIDTH, bias=False),
            nn.Linear(2 * WIDTH, WIDTH, bias=False),
        )

    def forward(self, batch: Stream) -> Stream:
        hidden_btd, mask_bt, positions_bt = batch
        positions_bt.clamp_(max=LENGTH)
        hidden_btd = hidden_btd + self._attention(self.norms[0](hidden_btd), mask_bt, positions_bt)
        gate, up = self.gate(self.norms[1](hidden_btd)).chunk(2, dim=-1)
        return hidden_btd + self.down(F.silu(gate) * up), mask_bt, positions_bt

    def _attention(self, x_btd: Tensor, mask_bt: Tensor, positions_bt: Tensor) -> Tensor:
        heads = (*x_btd.shape[:2], NUM_HEADS, WIDTH // NUM_HEADS)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x_btd).chunk(3, dim=-1))
        angles = positions_bt[:, None, :, None] / 10 ** torch.arange(heads[-1] // 2)
        q, k = (_rotated(part, angles.to(x_btd.dtype)) for part in (q, k))
        causal = torch.ones(heads[1], heads[1], dtype=torch.bool).tril()
        mask = causal & mask_bt[:, None, None, :].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).flatten(2))


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Unembedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, batch: Stream) -> tuple[Tensor]:
        """-> ``(logits,)``."""
        return (self.linear(self.norm(batch[0])),)


def next_token_loss(outputs: tuple[Tensor] | Tensor, labels_bt: Tensor) -> Tensor:
    """Padding is marked in place. Under checkpointing DeepSpeed unwraps ``(logits,)``."""
    logits_btv = outputs[0] if isinstance(outputs, tuple) else outputs
    labels_bt[labels_bt == 0] = -100
    return F.cross_entropy(logits_btv.float().flatten(0, 1), labels_bt.flatten())


def token_batches(num: int, seed: int = 4) -> list[tuple[Stream, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num):
        ids = torch.randint(1, VOCABULARY, (2, LENGTH), generator=generator)
        ids[1, -2:] = 0  # padding
        labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
        labels[1, -3:] = 0
        batches.append(((ids, (ids > 0).long(), torch.arange(LENGTH).expand(2, -1).contiguous()), labels))
    return batches


def llama_layers() -> list[Any]:
    from deepspeed.pipe import LayerSpec

    return [LayerSpec(Embedding), *(LayerSpec(Decoder) for _ in range(6)), LayerSpec(Unembedding)]


def write_layer_files(folder: Path) -> None:
    """What converters write: the layers' weights, and a file that DeepSpeed asks for."""
    torch.manual_seed(8)
    tag = folder / "global_step0"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    for number, spec in enumerate(llama_layers()):
        torch.save(spec.build().state_dict(), tag / f"layer_{number:02d}-model_states.pt")
    for rank in range(NUM_STAGES):
        states = {"dp_world_size": 1, "mp_world_size": NUM_STAGES, "module": None, "optimizer": None}
        states |= {"global_steps": 0, "skipped_steps": 0, "iteration": 0}
        torch.save(states, tag / f"mp_rank_{rank:02d}_model_states.pt")


def hand_written_llama(kit: Kit, folder: Path, *, bf16: bool, checkpointing: bool) -> Outcome:
    """Tuples between layers, ``(logits,)`` at the end, weights from converted files, parameters by hand."""
    torch.manual_seed(0)
    net = kit.pipeline(
        layers=llama_layers(),
        loss_fn=next_token_loss,
        num_stages=NUM_STAGES,
        partition_method="uniform",
        activation_checkpoint_interval=int(checkpointing),
    )
    engine, _, _, _ = kit.initialize(
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        config=kit.config(
            gradient_accumulation_steps=3,
            optimizer={"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
            bf16={"enabled": bf16},
            # DeepSpeed's reentrant checkpointing knows no inputs without gradients.
            pipeline={"use_reentrant": False},
        ),
    )
    engine.load_checkpoint(folder, load_module_only=True, load_optimizer_states=False)
    data = iter(token_batches(9))
    losses = [float(engine.train_batch(data_iter=data)) for _ in range(3)]
    return _outcome(engine, losses)


# A model whose last layer takes the labels and returns the loss.


class LossLayer(nn.Module):
    """Hidden state, mask, labels -> the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.unembedding = Unembedding()

    def forward(self, batch: Stream) -> Tensor:
        return next_token_loss(self.unembedding(batch), batch[2])


class PositionFree(Decoder):
    """Carries the labels where others carry positions."""

    def forward(self, batch: Stream) -> Stream:
        hidden_btd, mask_bt, labels_bt = batch
        positions_bt = torch.zeros_like(labels_bt)
        return (*super().forward((hidden_btd, mask_bt, positions_bt))[:2], labels_bt)


def loss_in_last_layer(kit: Kit) -> Outcome:
    """``loss_fn=None``; the labels travel with the inputs; evaluation returns the loss."""
    torch.manual_seed(0)
    net = kit.pipeline(
        layers=[Embedding(), *(PositionFree() for _ in range(6)), LossLayer()],
        loss_fn=None,
        num_stages=NUM_STAGES,
        partition_method="uniform",
        head=lambda _: LossLayer(),
    )
    engine, _, _, _ = kit.initialize(
        model=net,
        model_parameters=net.parameters(),
        config=kit.config(gradient_accumulation_steps=2, optimizer={"type": "SGD", "params": {"lr": 0.1}}),
    )

    def data(seed: int) -> Iterator[Any]:
        for (ids, mask, _), labels in token_batches(6, seed):
            yield (ids, mask, labels), labels

    training = data(4)
    losses = [float(engine.train_batch(data_iter=training)) for _ in range(3)]
    return _outcome(engine, losses)


# A script that drives the engine in its own way.


def driven_by_hand(kit: Kit, folder: Path) -> Outcome:
    """``set_dataiterator``, another batch size on the way, a scheduler as a callable, save and resume."""

    def make_engine() -> Any:
        torch.manual_seed(0)
        net = kit.pipeline(
            layers=llama_layers(),
            loss_fn=next_token_loss,
            num_stages=NUM_STAGES,
            partition_method="uniform",
        )
        return kit.initialize(
            model=net,
            config=kit.config(
                gradient_accumulation_steps=2,
                optimizer={"type": "SGD", "params": {"lr": 0.3, "momentum": 0.9}},
            ),
            lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.7),
        )[0]

    batches = token_batches(14)
    engine = make_engine()
    engine.set_dataiterator(iter(batches[:4]))
    losses = [float(engine.train_batch()) for _ in range(2)]
    engine.set_train_batch_size(6)  # three micro-batches
    engine.set_dataiterator(iter(batches[4:10]))
    losses += [float(engine.train_batch())]
    evaluated = float(engine.eval_batch(iter(token_batches(3, seed=9))))
    engine.save_checkpoint(folder, tag="half", client_state={"losses": losses})
    engine.destroy()
    engine = make_engine()
    _, client = engine.load_checkpoint(folder, tag="half")
    engine.set_train_batch_size(6)
    engine.set_dataiterator(iter(batches[7:]))
    return _outcome(engine, [*client["losses"], evaluated, float(engine.train_batch())])
