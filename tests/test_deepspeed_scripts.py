"""Whole DeepSpeed scripts, in every mode. Global gives DeepSpeed's numbers, bit for bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_scripts import (
    MODES,
    Kit,
    Outcome,
    convolutional_network,
    driven_by_hand,
    hand_written_llama,
    loss_in_last_layer,
    write_layer_files,
)
from ranks import RankPool


def run(script: Any, kits: list[Kit], folder: Path | None, **options: Any) -> list[Outcome]:
    """The script for each kit, one after the other. On a rank."""
    outcomes = []
    for kit in kits:
        folders = {} if folder is None else {"folder": folder / kit.mode}
        outcomes.append(script(kit, **folders, **options))
    return outcomes


def check(pool: RankPool, script: Any, folder: Path | None = None, **options: Any) -> None:
    """All modes train, and differ; global is DeepSpeed."""
    kits = [Kit(mode) for mode in MODES]
    by_rank = pool.run(run, script=script, kits=kits, folder=folder, **options)
    for outcomes in by_rank:
        by_mode = dict(zip(MODES, outcomes, strict=True))
        torch.testing.assert_close(by_mode["global"], by_mode["DeepSpeed"], rtol=0, atol=0)
        assert all(torch.tensor(losses).isfinite().all() for losses, _ in outcomes)
        assert by_mode["local"][1].keys() == by_mode["DeepSpeed"][1].keys()
    for mode in ("local", "window 2"):  # the first stage hears of other losses
        number = list(MODES).index(mode)
        first = by_rank[0][number][1], by_rank[0][0][1]
        assert any(not torch.equal(a, b) for a, b in zip(first[0].values(), first[1].values(), strict=True))


def test_convolutional_network(ranks4: RankPool) -> None:
    check(ranks4, convolutional_network, partition_method="parameters")


@pytest.mark.parametrize(("bf16", "checkpointing"), [(False, False), (True, True)])
def test_hand_written_llama(ranks4: RankPool, tmp_path: Path, bf16: bool, checkpointing: bool) -> None:
    write_layer_files(tmp_path)
    script = partial(hand_written_llama, folder=tmp_path, bf16=bf16, checkpointing=checkpointing)
    check(ranks4, script)


def test_loss_in_last_layer(ranks4: RankPool) -> None:
    check(ranks4, loss_in_last_layer)


def test_driven_by_hand(ranks4: RankPool, tmp_path: Path) -> None:
    check(ranks4, driven_by_hand, folder=tmp_path)
