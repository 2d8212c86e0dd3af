"""The experiment's table comes from its results file, and the documentation says what is in it."""

from argparse import Namespace
from pathlib import Path

import pytest

from experiments import finetune

ROOT = Path(__file__).parents[2]
BUDGET = {
    "max_steps": 24,
    "seq_length": 128,
    "batch": 4,
    "learning_rate": 5e-5,
    "token_fraction": 0.25,
    "max_eval_samples": 24,
}


def test_the_documentation_quotes_the_results() -> None:
    results = finetune.read(ROOT / finetune.RESULTS)
    assert {(r["mode"], r["heads"]) for r in results} == {(s.mode, s.heads) for s in finetune.settings(0.25)}
    documented = (ROOT / "docs" / "finetune.md").read_text()
    for result in results:
        losses = f"{result['metrics']['first_eval_loss']:.3f} | {result['metrics']['eval_loss']:.3f}"
        heads = result["heads"].replace("none", "–")
        assert f"| {result['mode']} | {heads} | {losses} |" in documented
        assert "Paris" in result["written"]


def test_results_are_appended_and_not_repeated(tmp_path: Path) -> None:
    file, options = tmp_path / "results" / "finetune.jsonl", Namespace(**BUDGET)
    first, second = list(finetune.settings(0.25))[:2]
    metrics = {"first_eval_loss": 2.0, "eval_loss": 1.0, "peak_memory_bytes": [10**9, 2 * 10**9]}
    for seed, loss in ((0, 1.0), (1, 2.0)):
        run = {"mode": first.mode, "heads": first.heads, "seed": seed, "budget": finetune.budget(options)}
        finetune.append(file, {**run, "metrics": {**metrics, "eval_loss": loss}})
    assert finetune.is_done(file, first, 1, options)
    assert not finetune.is_done(file, first, 2, options)
    assert not finetune.is_done(file, second, 0, options)
    assert not finetune.is_done(file, first, 0, Namespace(**{**BUDGET, "max_steps": 25}))
    table = finetune.table(finetune.read(file))
    assert "| global | none | 2.000 ± 0.000 | 1.500 ± 0.707 | – | – | 1.00 / 2.00 |" in table
    assert "seeds 0, 1" in table


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_every_mode_has_warm_and_cold_heads(fraction: float) -> None:
    settings = list(finetune.settings(fraction))
    assert len({setting.name for setting in settings}) == len(settings) == 7
    assert all(s.section["head"]["token_fraction"] == fraction for s in settings[1:])
