"""What the last layer may return, and labels: tuples of one, the loss itself, outputs without a loss."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_jobs import (
    VOCABULARY,
    WIDTH,
    Block,
    Job,
    layers,
    loss_fn,
    make_engine,
    micro_batches,
    parameters_of,
)
from ranks import RankPool, caught
from torch import Tensor, nn

from ds_interlock import ConfigError, LossHead

MODES = {
    "global": {"mode": "global"},
    "local": {"mode": "local"},
    "window 2": {"mode": "interlock", "window": 2},
    "window 1.5": {"mode": "interlock", "window": 1.5},
}


class TupleBlock(Block):
    """Returns a tuple of one; takes one, or only what is in it."""

    def __init__(self, takes_tuples: bool) -> None:
        super().__init__()
        self.takes_tuples = takes_tuples

    def forward(self, hidden: Any) -> Any:
        assert isinstance(hidden, tuple) == self.takes_tuples
        return (super().forward(hidden[0] if self.takes_tuples else hidden),)


class FirstBlock(TupleBlock):
    """Takes a tensor."""

    def __init__(self) -> None:
        super().__init__(takes_tuples=False)


class Plain(nn.Linear):
    """No layer of torch's own, as whose copies heads would start from other values."""


class Unembedding(nn.Linear):
    """Returns ``(logits,)``."""

    def forward(self, hidden: Any) -> Any:
        return (super().forward(hidden[0] if isinstance(hidden, tuple) else hidden),)


def loss_of_tuple(outputs: tuple[Tensor], labels: Tensor) -> Tensor:
    (logits,) = outputs
    return loss_fn(logits, labels)


def tuple_layers(recomputes: bool) -> list[Any]:
    from deepspeed.pipe import LayerSpec

    first, *_ = layers()
    blocks = [LayerSpec(TupleBlock, not recomputes) for _ in range(7)]
    return [first, LayerSpec(FirstBlock), *blocks, LayerSpec(Unembedding, WIDTH, VOCABULARY)]


def plain_layers() -> list[Any]:
    from deepspeed.pipe import LayerSpec

    first, *_ = layers()
    blocks = [LayerSpec(Block) for _ in range(8)]
    return [first, *blocks, LayerSpec(Plain, WIDTH, VOCABULARY)]


def single_sequences(num: int) -> Iterator[Any]:
    return iter([(inputs[:1], labels[:1]) for inputs, labels in micro_batches(num)])


def train_and_evaluate(job: Job, **module: Any) -> tuple[dict[str, Tensor], list[float]]:
    engine = make_engine(job, **module)
    losses = [float(engine.train_batch(single_sequences(4))) for _ in range(2)]
    if job.section is not None:
        losses = [float(engine.drain())]
    losses = [losses[-1], float(engine.eval_batch(single_sequences(4)))]
    parameters = parameters_of(engine)
    engine.destroy()
    return parameters, losses


def tuples_and_tensors(section: dict[str, Any]) -> list[tuple[dict[str, Tensor], list[float]]]:
    """A model in tuples, with and without recomputation, and the same one in tensors; then DeepSpeed's."""
    job = Job(section, extra={"train_micro_batch_size_per_gpu": 1})
    recomputing = {
        "activation_checkpoint_interval": 1,
        # In DeepSpeed without the first: it cannot recompute what has no gradient in its input.
        "checkpointable_layers": ["TupleBlock"],
    }
    jobs = [job, job.but(section=None)] if section == MODES["global"] else [job]
    results = []
    for each in jobs:
        results += [
            train_and_evaluate(each, layers=plain_layers()),
            train_and_evaluate(each, layers=tuple_layers(recomputes=False), loss_fn=loss_of_tuple),
            train_and_evaluate(
                each, layers=tuple_layers(recomputes=True), loss_fn=loss_of_tuple, **recomputing
            ),
            # What DeepSpeed recomputes gives no tuple of one, also at the end.
            train_and_evaluate(
                each,
                layers=tuple_layers(recomputes=True),
                **{**recomputing, "checkpointable_layers": ["TupleBlock", "Unembedding"]},
            ),
        ]
    return results


@pytest.mark.parametrize("section", MODES.values(), ids=MODES)
def test_tuples_of_one_are_as_good_as_tensors(ranks4: RankPool, section):
    for results in ranks4.run(tuples_and_tensors, section=section):
        parameters, losses = results[0]
        for others, other_losses in results[1:]:
            assert parameters.keys() == others.keys()
            assert not [n for n, p in parameters.items() if not torch.equal(p, others[n])]
            assert other_losses == losses


# The loss in the last layer.


class Carrying(nn.Module):
    """Applies a layer to the first of two; the second are labels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.layer(inputs[0]), inputs[1]


class LossLayer(nn.Linear):
    """Unembeds, and returns the loss."""

    def __init__(self) -> None:
        super().__init__(WIDTH, VOCABULARY)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(super().forward(inputs[0]).flatten(0, 1), inputs[1].flatten())


def carrying(kind: Any, *args: Any) -> nn.Module:
    return Carrying(kind(*args))


def layers_with_a_loss() -> list[Any]:
    torch.manual_seed(3)
    return [carrying(nn.Embedding, VOCABULARY, WIDTH), *(carrying(Block) for _ in range(7)), LossLayer()]


def make_loss_head(head: LossHead) -> nn.Module:
    return LossLayer()


def with_labels_inside(num: int) -> Iterator[Any]:
    return iter([((inputs, labels), 0) for inputs, labels in micro_batches(num)])


def train_without_loss_fn(job: Job, **module: Any) -> tuple[list[float], dict[str, Tensor], Any]:
    engine = make_engine(job, layers=layers_with_a_loss(), loss_fn=None, **module)
    losses = [float(engine.train_batch(with_labels_inside(4))) for _ in range(3)]
    if job.section is not None:
        losses = [*losses[:-1], float(engine.drain())]
    losses.append(float(engine.eval_batch(with_labels_inside(4))))
    heads = {}
    if module:
        _, heads = engine.eval_batch(with_labels_inside(4), return_head_losses=True)
    result = losses, parameters_of(engine), heads
    engine.destroy()
    return result


def losses_in_the_last_layer() -> dict[str, Any]:
    streaming = {"streaming": False}
    return {
        "theirs": train_without_loss_fn(Job(None)),
        "global": train_without_loss_fn(Job(MODES["global"])),
        "local": train_without_loss_fn(Job(MODES["local"] | streaming), head=make_loss_head),
        "window 2": train_without_loss_fn(Job(MODES["window 2"] | streaming), head=make_loss_head),
        "refused": caught(train_without_loss_fn, Job(MODES["window 2"])),
    }


def test_the_loss_in_the_last_layer(ranks4: RankPool):
    for results in ranks4.run(losses_in_the_last_layer):
        losses, parameters, _ = results["theirs"]
        ours = results["global"]
        assert ours[0] == losses
        assert all(torch.equal(p, ours[1][n]) for n, p in parameters.items())
        for mode, num_heads in (("local", 4), ("window 2", 3)):
            own, _, heads = results[mode]
            assert own[0] == losses[0], "the first loss is before any step"
            assert own[-1] < own[0]
            assert len(heads) == num_heads
            assert list(heads.values())[-1] == pytest.approx(own[-1])
        assert isinstance(results["refused"], ConfigError)
        assert str(results["refused"]).startswith("loss_fn is None, so the last layer returns the loss")


# Outputs without a loss, and labels that are numbers.


def numbers_as_labels(num_outputs: int) -> Any:
    torch.manual_seed(4)
    linears = [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, num_outputs)]
    inputs = torch.arange(12.0).view(4, 1, 3) * (1 + torch.distributed.get_rank() % 2)
    return linears, [(each, 0) for each in inputs]


def squared(outputs: Tensor, label: Any) -> Tensor:
    return (outputs - label - 0.3).square().mean()


def evaluate_without_loss_fn() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, section in {"theirs": None, "global": MODES["global"], "local": MODES["local"]}.items():
        for num_outputs in (1, 2):
            linears, data = numbers_as_labels(num_outputs)
            head = {"head": make_linear_head} if section == MODES["local"] else {}
            engine = make_engine(
                Job(section, num_stages=2), layers=linears, loss_fn=None, partition_method="uniform", **head
            )
            # DeepSpeed can broadcast one number only.
            outputs = engine.eval_batch(iter(data), bcast_loss=num_outputs == 1)
            results[f"{name} {num_outputs}"] = outputs if outputs is None else outputs.flatten()
            engine.destroy()
    for name, section in {"theirs": None, "global": MODES["global"]}.items():
        linears, data = numbers_as_labels(1)
        engine = make_engine(Job(section, num_stages=2), layers=linears, loss_fn=squared)
        results[f"{name}, trained"] = float(engine.train_batch(iter(data)))
        engine.destroy()
    return results


def make_linear_head(head: LossHead) -> nn.Module:
    return nn.Linear(3, 1)


def test_outputs_without_a_loss_and_numbers_as_labels(ranks4: RankPool):
    for rank, results in enumerate(ranks4.run(evaluate_without_loss_fn)):
        for mode in ("global", "local"):
            for num_outputs in (1, 2):
                ours, theirs = results[f"{mode} {num_outputs}"], results[f"theirs {num_outputs}"]
                assert (ours is None) == (theirs is None) == (num_outputs == 2 and rank < 2)
                assert ours is None or torch.equal(ours, theirs)
        assert results["global, trained"] == results["theirs, trained"]
