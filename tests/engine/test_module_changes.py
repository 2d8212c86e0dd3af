"""What a script may do to the module between batches."""

from typing import Any

import torch
from engine_jobs import Job, loss_fn, make_engine, micro_batches, parameters_of
from ranks import RankPool
from torch import Tensor

SECTIONS: dict[str, dict[str, Any] | None] = {
    "DeepSpeed": None,
    "global": {"mode": "global"},
    "local": {"mode": "local"},
}


def doubled(logits_btv: Tensor, labels_bt: Tensor) -> Tensor:
    return 2 * loss_fn(logits_btv, labels_bt)


def change_the_module(section: dict[str, Any] | None) -> dict[str, Any]:
    """Trains with layers that were put to eval(), evaluates, and trains with another loss."""
    engine = make_engine(Job(section, num_stages=2, num_micro_batches=2, dropout=0.5))
    engine.module.eval()
    engine.train_batch(iter(micro_batches(2)))
    if section is not None:
        engine.drain()
    first = parameters_of(engine)
    evaluated = [float(engine.eval_batch(iter(micro_batches(2, seed=9))))]
    modes = {module.training for module in engine.module.modules()}
    engine.module.loss_fn = doubled
    evaluated.append(float(engine.eval_batch(iter(micro_batches(2, seed=9)))))
    engine.train_batch(iter(micro_batches(2, seed=7)))
    if section is not None:
        engine.drain()
    result = {"evaluated": evaluated, "modes": modes, "first": first, "after": parameters_of(engine)}
    engine.destroy()
    return result


def change_all() -> dict[str, dict[str, Any]]:
    return {name: change_the_module(section) for name, section in SECTIONS.items()}


def test_modes_of_layers_and_another_loss_are_as_in_deepspeed(ranks2: RankPool) -> None:
    for results in ranks2.run(change_all):
        theirs = results["DeepSpeed"]
        for name in ("global", "local"):
            before, after = results[name]["evaluated"]
            assert after == 2 * before
            assert results[name]["modes"] == theirs["modes"] == {False}
        assert results["global"]["evaluated"] == theirs["evaluated"]
        for part in ("first", "after"):
            ours = results["global"][part]
            assert all(torch.equal(parameter, ours[name]) for name, parameter in theirs[part].items())
