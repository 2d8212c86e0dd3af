"""The cost of heads: what is counted, and that a small run leaves what it should."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import head_cost
from benchmarks.results import parse

SIZES = {
    "width": 24,
    "num_heads": 2,
    "num_blocks": 2,
    "vocab_size": 300,
    "seq_length": 16,
    "micro_batch_size": 2,
    "repeats": 1,
}


def words(**options: object) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", *str(value).split(";"))]


@pytest.fixture
def bench() -> head_cost.Bench:
    return head_cost.Bench(parse(None, head_cost.OPTIONS, words(**SIZES)))


def test_the_formula_of_the_stage_is_that_of_its_linear_layers_and_attention(bench: head_cost.Bench) -> None:
    with FlopCounterMode(display=False) as counter:
        bench.run_stage()
    counted = counter.get_flop_counts()["Global"]
    linear = 6 * 32 * sum(p.numel() for p in bench.stage.parameters() if p.dim() == 2)
    assert sum(n for op, n in counted.items() if "attention" not in str(op)) == linear
    attention = (
        6 * 32 * 2 * 2 * 16 * 24
    )  # two blocks; scores and mixture, 2 t d each, and twice in the backward
    assert head_cost.stage_flops(bench.lm, 32) == linear + attention


def test_peak_memory_is_the_most_that_exists_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.ones(1000)
        del first
        return torch.ones(3000)

    assert head_cost.peak_memory(work, "cpu") == pytest.approx(12_000, abs=500)


def test_head_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "head_cost.json"
    threads = torch.get_num_threads()
    head_cost.main(words(**SIZES, dtype="bfloat16", device="cpu", output=output))
    torch.set_num_threads(threads)
    results = json.loads(output.read_text())
    heads = {row["setting"]: row for row in results["rows"] if row["part"] == "head"}
    assert list(heads) == list(head_cost.SETTINGS)
    # A product of [n, a] and [a, b] is 2 n a b; a trained matrix takes three, a frozen one two.
    assert heads["norm_linear"]["flops"] == 2 * 32 * 3 * 24 * 300
    assert heads["low_rank 64"]["flops"] == 2 * 32 * 3 * 64 * (24 + 300)
    assert heads["lens, 1/8 of tokens"]["flops"] == 2 * 4 * (3 * 24 * 24 + 2 * 24 * 300)
    assert heads["lens"]["optimizer_bytes"] < heads["norm_linear"]["optimizer_bytes"] / 5
    assert heads["norm_linear, 1/8 of tokens"]["peak_bytes"] < heads["norm_linear"]["peak_bytes"]
    assert capsys.readouterr().out.count("\n| head | lens") == 3
    assert min(row["of_stage"] for row in heads.values()) > 0
    lens = heads["lens"]
    assert lens["of_stage_flops"] == pytest.approx(lens["flops"] / (6 * 32 * 2 * (12 * 24**2 + 2 * 16 * 24)))
